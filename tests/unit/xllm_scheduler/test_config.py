"""The settings of the elastic scheduler: defaults, and what each refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xllm_plugins.config import parse_section
from xllm_plugins.errors import ConfigError
from xllm_scheduler.config import SchedulerSection

POSITIVE = ("a number above 0", [0, -1.0, float("nan"), float("inf"), True, "100", None, [1]])
SHARE = ("a number above 0 and at most 1", [0, -0.1, 1.01, float("nan"), True, "0.5", None])
REFUSED: dict[str, tuple[str, list[Any]]] = {
    "mode": ("auto, on, off", ["yes", "ON", 1, None]),
    "policy": ("a text", [1, True, None, ["elastic"]]),
    "ttft_ms": POSITIVE,
    "tpot_ms": POSITIVE,
    "offline_above_priority": ("a whole number", [1.0, "1", True, None]),
    "priority_tier_factor": SHARE,
    "online_share": SHARE,
    "idle_step_share": SHARE,
    "margin_steps": (
        "a number at least 0 and at most 2",
        [-0.1, 2.1, float("nan"), True, "1", None],
    ),
    "offline_floor": ("a number at least 0 and at most 1", [-0.1, 1.1, float("nan"), True, "0"]),
    "offline_ageing_s": POSITIVE,
    "profile": ("a text", [1, True, None, ["a"]]),
    "profile_dir": ("a text", [1, True, None, ["a"]]),
    "objectives": (
        "a mapping of names to online or offline",
        ["batch", ["batch"], None, {"batch": "later"}, {"batch": True}, {1: "offline"}],
    ),
}


def test_the_defaults_are_valid_as_they_travel_to_the_engine() -> None:
    values = dataclasses.asdict(SchedulerSection()) | {"mode": "auto"}
    assert parse_section(SchedulerSection, "scheduler", values) == SchedulerSection()


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(SchedulerSection)])
def test_every_setting_refuses_what_it_cannot_be(key: str) -> None:
    allowed, bad_values = REFUSED[key]
    for value in bad_values:
        with pytest.raises(ConfigError) as caught:
            parse_section(SchedulerSection, "scheduler", {key: value})
        assert str(caught.value) == (
            f"scheduler.{key} from the engine's configuration is {value!r}; allowed is {allowed}."
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("priority_tier_factor", 1),
        ("online_share", 1.0),
        ("idle_step_share", 0.001),
        ("offline_above_priority", -5),
        ("ttft_ms", 1),
        ("objectives", {}),
        ("objectives", {"batch": "offline", "": "online"}),
    ],
)
def test_values_at_the_edge_are_taken(key: str, value: object) -> None:
    assert getattr(parse_section(SchedulerSection, "scheduler", {key: value}), key) == value
