"""The class of a request: what the client says, the tier, the priority, and the defaults."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xllm_plugins.errors import ConfigError
from xllm_scheduler.classes import Service, ServiceClass, classify, complete_xargs
from xllm_scheduler.config import SchedulerSection

SECTION = SchedulerSection(ttft_ms=2000.0, tpot_ms=100.0, priority_tier_factor=0.5)
ONLINE, OFFLINE = ServiceClass.ONLINE, ServiceClass.OFFLINE


@pytest.mark.parametrize(
    ("xargs", "priority", "service"),
    [
        ({}, 0, Service(ONLINE, 2000.0, 100.0)),
        ({}, -3, Service(ONLINE, 2000.0, 100.0)),
        ({}, 1, Service(ONLINE, 2000.0, 100.0)),
        ({}, 2, Service(OFFLINE, 2000.0, 100.0)),
        ({"xllm_class": "online"}, 9, Service(ONLINE, 2000.0, 100.0)),
        ({"xllm_class": "offline"}, 0, Service(OFFLINE, 2000.0, 100.0)),
        ({"xllm_ttft_ms": 500, "xllm_tpot_ms": 20.5}, 0, Service(ONLINE, 500.0, 20.5)),
        ({"xllm_ttft_ms": "500"}, 0, Service(ONLINE, 500.0, 100.0)),
        ({"other": 1}, 0, Service(ONLINE, 2000.0, 100.0)),
    ],
)
def test_a_request_has_a_class_and_slos(
    xargs: dict[str, Any], priority: int, service: Service
) -> None:
    assert classify(xargs, priority, SECTION) == service
    assert service.online is (service.kind is ONLINE)


def test_the_bound_between_the_classes_is_a_setting() -> None:
    section = SchedulerSection(offline_above_priority=-1)
    assert [classify({}, p, section).kind for p in (-2, -1, 0)] == [ONLINE, ONLINE, OFFLINE]


@pytest.mark.parametrize("value", ["batch", "ONLINE", "", 1, True, ["online"]])
def test_a_class_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        classify({"xllm_class": value}, 0, SECTION)
    assert str(caught.value) == f"xllm_class is {value!r}; allowed is online or offline."


@pytest.mark.parametrize("key", ["xllm_ttft_ms", "xllm_tpot_ms"])
@pytest.mark.parametrize("value", [0, -5, "fast", "", None, True, math.nan, math.inf, "inf", [100]])
def test_an_slo_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        classify({key: value}, 0, SECTION)
    assert str(caught.value) == (
        f"{key} is {value!r}; allowed is a number of milliseconds above 0."
    )


PRIORITY_SLOS = {"xllm_ttft_ms": 1000.0, "xllm_tpot_ms": 50.0}


@pytest.mark.parametrize(
    ("tier", "xargs", "filled", "served"),
    [
        (None, {}, {}, None),
        (None, {"xllm_class": "offline"}, {"xllm_class": "offline"}, None),
        ("auto", {}, {}, "default"),
        ("default", {}, {}, "default"),
        ("scale", {}, {}, "default"),
        ("standard_only", {}, {}, "default"),
        ("flex", {}, {"xllm_class": "offline"}, "flex"),
        ("priority", {}, {"xllm_class": "online"} | PRIORITY_SLOS, "priority"),
        # What the request says of itself wins over its tier.
        ("flex", {"xllm_class": "online"}, {"xllm_class": "online"}, "flex"),
        (
            "priority",
            {"xllm_ttft_ms": 1, "seed": 3},
            {"xllm_ttft_ms": 1, "seed": 3, "xllm_class": "online", "xllm_tpot_ms": 50.0},
            "priority",
        ),
    ],
)
def test_a_service_tier_fills_in_what_the_request_leaves_open(
    tier: str | None, xargs: dict[str, Any], filled: dict[str, Any], served: str | None
) -> None:
    given = dict(xargs)
    assert complete_xargs(given, tier, SECTION) == (filled, served)
    assert given == xargs, "the request's own mapping is left alone"


@pytest.mark.parametrize("tier", ["fast", "", "FLEX", 1])
def test_a_tier_that_is_none_is_refused(tier: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        complete_xargs({}, tier, SECTION)
    assert str(caught.value) == (
        f"service_tier is {tier!r}; allowed is auto, default, flex, priority, scale, standard_only."
    )


@pytest.mark.parametrize("tier", [None, "default", "flex", "priority"])
def test_a_bad_value_is_refused_whatever_the_tier(tier: str | None) -> None:
    with pytest.raises(ConfigError, match="xllm_tpot_ms is -1"):
        complete_xargs({"xllm_tpot_ms": -1}, tier, SECTION)
