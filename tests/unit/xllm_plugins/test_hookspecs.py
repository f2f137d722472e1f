"""The hooks: each is documented with its arguments, each example works, each has a test."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.doubles import Install
from xllm_plugins import cli, hookspecs
from xllm_plugins.config import parse_section
from xllm_plugins.errors import ConfigError
from xllm_plugins.latency import StepTime
from xllm_plugins.manager import registry
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.policy import StepPlan, StepView

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "hooks.md").read_text()
EXAMPLES = {
    heading: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for heading, text in re.findall(r"^## (xllm_\w+).*?\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
HOOKS: dict[str, Callable[..., Any]] = {
    name: member
    for name, member in vars(hookspecs).items()
    if name.startswith("xllm_") and inspect.isfunction(member)
}


def test_every_hook_is_documented_with_its_arguments() -> None:
    documented = dict(re.findall(r"^## (xllm_\w+)\((.*)\)$", PAGE, re.MULTILINE))
    assert documented == {
        name: ", ".join(inspect.signature(hook).parameters) for name, hook in HOOKS.items()
    }


def test_every_hook_has_its_line_of_documentation() -> None:
    assert all(inspect.getdoc(hook) for hook in HOOKS.values())


def test_every_hook_has_a_test() -> None:
    missing = [name for name in HOOKS if f"test_hook_{name}" not in globals()]
    assert missing == []


@pytest.fixture
def documented_plugin(install: Install, request: pytest.FixtureRequest) -> None:
    """The documentation's example for the hook that the test is named after, installed."""
    (source,) = EXAMPLES[request.function.__name__.removeprefix("test_hook_")]
    install(
        "documented", {"xllm_plugins": {"documented": "documented_p"}}, {"documented_p": source}
    )


@pytest.mark.usefixtures("documented_plugin")
def test_hook_xllm_features() -> None:
    feature = registry().features()["cache"]
    section = parse_section(feature.section, "cache", {"blocks": 8})
    assert feature.summary == "Keeps blocks."
    assert (section.mode.value, getattr(section, "blocks", None)) == ("auto", 8)
    with pytest.raises(ConfigError, match="allowed is a whole number at least 1"):
        parse_section(feature.section, "cache", {"blocks": 0})


@pytest.mark.usefixtures("documented_plugin")
def test_hook_xllm_policies() -> None:
    policy = registry().policy("scheduler.step", "half-budget").factory(SchedulerSection())
    assert policy.plan(StepView(0.0, 100, StepTime())) == StepPlan(50)


@pytest.mark.usefixtures("documented_plugin")
def test_hook_xllm_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "world"]) == 0
    assert capsys.readouterr().out == "hello world\n"


FAILING = """
from xllm_plugins.errors import XllmError
from xllm_plugins.hookspecs import hookimpl

def run(args):
    raise XllmError("There is no trace.")

@hookimpl
def xllm_commands(subparsers):
    subparsers.add_parser("replay").set_defaults(run=run)
"""


def test_an_error_of_ours_in_a_command_is_one_line_and_status_2(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("failing", {"xllm_plugins": {"failing": "failing_p"}}, {"failing_p": FAILING})
    assert cli.main(["replay"]) == 2
    assert capsys.readouterr().err == "xllm: There is no trace.\n"
