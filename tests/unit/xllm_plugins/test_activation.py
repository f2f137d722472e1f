"""From the user's choice to attached features: decisions, settings, and vLLM's allow-list."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from tests.unit.doubles import Install, feature_module
from xllm_plugins.activation import (
    REPORT_KEY,
    SETTINGS_KEY,
    allow_list,
    attach_features,
    choose_config,
    current_selection,
    decide,
    load_settings,
    section_of,
)
from xllm_plugins.config import Mode, Section
from xllm_plugins.errors import ConfigError, FeatureError, NotAvailableError
from xllm_plugins.features import Attachment, Decision, Feature, Selection
from xllm_plugins.manager import registry
from xllm_scheduler.service.member import ServiceSection


def attaches(_: Attachment) -> str:
    return "vllm.Scheduler"


def stands_back(_: Attachment) -> str:
    raise NotAvailableError("the model is too small")


def breaks(_: Attachment) -> str:
    raise KeyError("layers")


def decided(attach: Callable[[Attachment], str], mode: Mode, **changes: Any) -> Decision:
    feature = Feature("kv", "", Section, attach, **changes)
    section = Section(mode)
    attachment = Attachment(cast(Any, None), cast(Any, None), section)
    return decide(feature, section, Selection("xllm", frozenset({"kv"})), attachment)


@pytest.mark.parametrize(
    ("attach", "mode", "decision"),
    [
        (
            attaches,
            Mode.AUTO,
            Decision("kv", "auto", True, "its conditions hold", "vllm.Scheduler"),
        ),
        (attaches, Mode.ON, Decision("kv", "on", True, "asked for", "vllm.Scheduler")),
        (attaches, Mode.OFF, Decision("kv", "off", False, "kv.mode is off")),
        (stands_back, Mode.AUTO, Decision("kv", "auto", False, "the model is too small")),
        (stands_back, Mode.OFF, Decision("kv", "off", False, "kv.mode is off")),
        (
            breaks,
            Mode.AUTO,
            Decision("kv", "auto", False, "it failed to attach: KeyError: 'layers'"),
        ),
        (breaks, Mode.OFF, Decision("kv", "off", False, "kv.mode is off")),
    ],
)
def test_a_feature_attaches_or_says_why_not(
    attach: Callable[[Attachment], str], mode: Mode, decision: Decision
) -> None:
    assert decided(attach, mode) == decision


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (stands_back, "the model is too small"),
        (breaks, "it failed to attach: KeyError: 'layers'"),
    ],
)
def test_mode_on_stops_start_up_where_the_feature_cannot_work(
    attach: Callable[[Attachment], str], reason: str
) -> None:
    with pytest.raises(FeatureError) as caught:
        decided(attach, Mode.ON)
    assert str(caught.value) == f"kv.mode is on, but it cannot work here: {reason}."


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.ON])
def test_a_setting_that_cannot_be_used_stops_start_up_in_any_mode(mode: Mode) -> None:
    def refuses(_: object) -> str:
        raise ConfigError("kv.size is 3; allowed is 2.")

    with pytest.raises(ConfigError, match=r"^kv\.size is 3"):
        decided(attaches, mode, check=refuses)
    with pytest.raises(ConfigError, match=r"^kv\.size is 3"):
        decided(refuses, mode)


def test_the_settings_of_a_feature_that_is_off_are_not_checked() -> None:
    assert not decided(attaches, Mode.OFF, check=breaks).active


@pytest.fixture
def gone_seam(monkeypatch: pytest.MonkeyPatch) -> str:
    """A seam that holds for no version, so whether vLLM is installed makes no difference."""
    module = ModuleType("xllm_plugins.compat.gone")
    module.__dict__.update(WHY="a test", HOLDS_FOR="<0", SEAM=())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "gone"


def test_a_feature_does_not_attach_across_a_seam_that_does_not_hold(gone_seam: str) -> None:
    decision = decided(breaks, Mode.AUTO, seams=(gone_seam,))
    assert not decision.active
    assert decision.reason.startswith("seam gone does not hold: ")
    with pytest.raises(FeatureError, match="seam gone does not hold"):
        decided(attaches, Mode.ON, seams=(gone_seam,))


class Config:
    """As much of vLLM's configuration as attaching looks at."""

    def __init__(self, additional_config: Any) -> None:
        self.additional_config = additional_config


@pytest.fixture
def oven(install: Install) -> None:
    entry = {"xllm_plugins": {"oven": "oven_plugin"}}
    install("oven", entry, {"oven_plugin": feature_module("oven")})


@pytest.mark.usefixtures("oven")
def test_settings_and_decisions_travel_beside_what_the_user_put_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLLM_PLUGINS", "xllm.oven")
    config = Config({"ascend": {"a": 1}, SETTINGS_KEY: {"oven": {"size": 7}}})
    attach_features(None, config)
    travelling = config.additional_config
    assert travelling["ascend"] == {"a": 1}
    assert travelling[SETTINGS_KEY]["oven"] == {"mode": "auto", "size": 7}
    report = travelling[REPORT_KEY]
    rows = {row["feature"]: (row["active"], row["reason"]) for row in report["features"]}
    assert rows == {
        "eplb": (False, "not selected"),
        "kv": (False, "not selected"),
        "oven": (True, "its conditions hold"),
        "scheduler": (False, "not selected"),
        "service": (False, "not selected"),
        "spec_decode": (False, "not selected"),
    }
    assert report["origins"]["oven.size"] == "--additional-config"
    assert report["origins"]["oven.mode"] == "default"


def test_secrets_do_not_travel_but_reach_the_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_PLUGINS", "xllm.service")
    monkeypatch.setenv("XLLM_SERVICE_TOKEN", "hush")
    monkeypatch.setenv("XLLM_SERVICE_BEAT_S", "0.5")
    config = Config({})
    attach_features(None, config)
    assert "hush" not in str(config.additional_config)
    section = section_of(registry().features()["service"], config)
    assert isinstance(section, ServiceSection)
    assert (section.token, section.beat_s) == ("hush", 0.5)


@pytest.mark.parametrize(
    ("additional", "error", "message"),
    [
        (object(), FeatureError, "--additional-config is a object; the xLLM features need a map"),
        ({SETTINGS_KEY: 3}, ConfigError, "--additional-config holds 3; allowed is a mapping"),
        ({SETTINGS_KEY: {"ovn": {}}}, ConfigError, "ovn from --additional-config is not a sec"),
    ],
)
@pytest.mark.usefixtures("oven")
def test_an_additional_config_that_cannot_be_used_stops_start_up(
    monkeypatch: pytest.MonkeyPatch, additional: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv("XLLM_PLUGINS", "xllm.oven")
    with pytest.raises(error, match=message):
        attach_features(None, Config(additional))


@pytest.mark.usefixtures("oven")
def test_inline_json_beats_additional_config_beats_the_file_beats_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("oven: {size: 3}")
    steps = [
        ({}, {}, "1", "default"),
        ({"XLLM_OVEN_SIZE": "4"}, {}, "4", "environment"),
        ({"XLLM_CONFIG": str(file)}, {}, "3", f"file {file}"),
        ({}, {"oven": {"size": 2}}, "2", "--additional-config"),
        ({"XLLM_CONFIG": '{"oven": {"size": 9}}'}, {"oven": {"size": 2}}, "9", "--xllm-config"),
    ]
    for variables, additional, size, origin in steps:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings = load_settings(additional)
        assert str(settings.as_dict()["oven"]["size"]) == size
        assert settings.origins["oven.size"] == origin


def test_settings_without_a_selection_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="--xllm-config needs --plugins"):
        current_selection()


def test_a_bad_xllm_config_is_refused_before_anything_is_handed_on() -> None:
    with pytest.raises(ConfigError, match="nothing from --xllm-config is not a section"):
        choose_config('{"nothing": {}}')
    with pytest.raises(ConfigError, match="needs --plugins"):
        current_selection()


def installed_names(*, endpoints: bool) -> set[str]:
    return {
        entry.name
        for distribution in distributions()
        for entry in distribution.entry_points
        if entry.group.startswith("vllm.") and (entry.group == "vllm.endpoint_plugins") is endpoints
    }


def test_an_unset_allow_list_becomes_everyone_but_other_peoples_endpoints(install: Install) -> None:
    groups = {
        "vllm.general_plugins": {"loras": "m:f"},
        "vllm.platform_plugins": {"ascend": "m:f"},
        "vllm.endpoint_plugins": {"routes": "m:f", "loras": "m:f"},
        "elsewhere": {"nobody": "m:f"},
    }
    install("stranger", groups, {})
    names = allow_list(None).split(",")
    by_name_only = {"lora_hf_hub_resolver"}
    assert set(names) == installed_names(endpoints=False) - by_name_only | {"xllm"}
    assert {"loras", "ascend", "xllm"} <= set(names)
    assert not {"routes", "nobody"} & set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("current", "result"),
    [
        ("ascend", "ascend,xllm"),
        ("routes, ascend", "routes,ascend,xllm"),
        ("xllm,ascend", "xllm,ascend"),
        ("", "xllm"),
    ],
)
def test_a_set_allow_list_keeps_its_order_and_gets_ours(current: str, result: str) -> None:
    assert allow_list(current) == result


@pytest.mark.parametrize("current", [None, "", "ascend", "xllm"])
def test_the_allow_list_is_the_same_in_a_child_process(current: str | None) -> None:
    assert allow_list(allow_list(current)) == allow_list(current)
