"""Discovery: built-in parts and strangers come in by one door, and a broken stranger stays out."""

from __future__ import annotations

import pytest

from tests.unit.doubles import Install, feature_module
from xllm_plugins.errors import ConfigError
from xllm_plugins.manager import registry

POLICIES = """
from xllm_plugins.features import Policy
from xllm_plugins.hookspecs import hookimpl

@hookimpl
def xllm_policies():
    return [Policy("scheduler.step", "{name}", dict), Policy("oven.bake", "slow", dict)]
"""


OURS = ("eplb", "kv", "scheduler", "service", "spec_decode")


def test_our_features_are_there_and_nothing_failed() -> None:
    assert tuple(registry().features()) == OURS
    assert registry().sections()["scheduler"].__name__ == "SchedulerSection"
    assert registry().failed == {}


def test_a_strangers_feature_stands_beside_ours(install: Install) -> None:
    install("oven", {"xllm_plugins": {"oven": "oven_p"}}, {"oven_p": feature_module("oven")})
    assert list(registry().features()) == [
        "eplb",
        "kv",
        "oven",
        "scheduler",
        "service",
        "spec_decode",
    ]
    assert registry().sections()["oven"].__name__ == "OvenSection"


BAD_ARGUMENT = """
from xllm_plugins.hookspecs import hookimpl
@hookimpl
def xllm_commands(parser): ...
"""
BAD_FEATURES = """
from xllm_plugins.hookspecs import hookimpl
@hookimpl
def xllm_features(): raise RuntimeError("no feature today")
"""
BAD_HOOK = """
from xllm_plugins.hookspecs import hookimpl
@hookimpl
def xllm_featuers(): return []
"""


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('no NPU')", "RuntimeError: no NPU"),
        ("def f(:", "SyntaxError: invalid syntax"),
        (BAD_ARGUMENT, "PluginValidationError: Plugin 'bad' for hook 'xllm_commands'"),
        (BAD_FEATURES, "RuntimeError: no feature today"),
        (BAD_HOOK, "PluginValidationError: unknown hook 'xllm_featuers' in plugin"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_recorded_and_hurts_nobody(
    install: Install, source: str, error: str
) -> None:
    install("bad", {"xllm_plugins": {"bad": "bad_p"}}, {"bad_p": source})
    install("zoo", {"xllm_plugins": {"zoo": "zoo_p"}}, {"zoo_p": feature_module("zoo")})
    assert registry().failed.keys() == {"bad"}
    assert registry().failed["bad"].startswith(error)
    assert list(registry().features()) == [*OURS, "zoo"]


def test_a_second_plugin_of_one_name_does_not_push_the_first_out(install: Install) -> None:
    for name in ("one", "two"):
        install(name, {"xllm_plugins": {"oven": f"{name}_p"}}, {f"{name}_p": feature_module(name)})
    assert registry().failed == {"oven": "ConfigError: Another plugin is already named 'oven'."}
    assert len({"one", "two"} & registry().features().keys()) == 1


def test_two_features_of_one_name_are_refused(install: Install) -> None:
    for name in ("one", "two"):
        install(name, {"xllm_plugins": {name: f"{name}_p"}}, {f"{name}_p": feature_module("oven")})
    with pytest.raises(ConfigError, match=r"^Two plugins bring a feature named 'oven'\.$"):
        registry().features()


def test_a_policy_is_found_by_kind_and_name(install: Install) -> None:
    install("p", {"xllm_plugins": {"p": "p_p"}}, {"p_p": POLICIES.format(name="mine")})
    assert registry().policy("scheduler.step", "mine").factory is dict
    assert registry().policy("scheduler.step", "elastic").factory.__name__ == "ElasticPolicy"
    with pytest.raises(ConfigError) as caught:
        registry().policy("scheduler.step", "slow")
    assert str(caught.value) == (
        "There is no scheduler.step policy named 'slow'; installed are elastic, mine."
    )


def test_a_policy_name_must_be_unique_within_its_kind(install: Install) -> None:
    install("p", {"xllm_plugins": {"p": "p_p"}}, {"p_p": POLICIES.format(name="elastic")})
    with pytest.raises(ConfigError, match=r"^There is more than one scheduler\.step policy named"):
        registry().policy("scheduler.step", "elastic")
