"""The class of a request: what the client says, a gateway's headers, the tier, the defaults."""

from __future__ import annotations

import math
import typing
from typing import Any

import pytest

from xllm_plugins.compat.request_class import RefusalError, Said
from xllm_plugins.errors import ConfigError
from xllm_scheduler.classes import Service, ServiceClass, classify, complete_xargs
from xllm_scheduler.config import ClassName, SchedulerSection

SECTION = SchedulerSection(
    ttft_ms=2000.0,
    tpot_ms=100.0,
    priority_tier_factor=0.5,
    objectives={"batch": "offline", "chat": "online"},
)
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
@pytest.mark.parametrize(
    "value", [0, -5, 10**400, "fast", "", None, True, math.nan, math.inf, "inf", [100]]
)
def test_an_slo_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        classify({key: value}, 0, SECTION)
    assert str(caught.value) == (
        f"{key} is {value!r}; allowed is a number of milliseconds above 0."
    )


def test_the_settings_know_the_classes_by_their_names() -> None:
    assert [c.value for c in ServiceClass] == list(typing.get_args(ClassName))


def refused(said: Said) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        complete_xargs(said, SECTION)
    return caught.value


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
        # What the request says of itself wins over its tier; the answer names what it got.
        ("flex", {"xllm_class": "online"}, {"xllm_class": "online"}, "default"),
        ("default", {"xllm_class": "offline"}, {"xllm_class": "offline"}, "flex"),
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
    assert complete_xargs(Said(given, tier), SECTION) == (filled, served)
    assert given == xargs, "the request's own mapping is left alone"


OBJECTIVE, OLD_OBJECTIVE = "x-llm-d-inference-objective", "x-gateway-inference-objective"
TTFT, OLD_TTFT = "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"
TPOT, OLD_TPOT = "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"


@pytest.mark.parametrize(
    ("headers", "filled"),
    [
        ({OBJECTIVE: "batch"}, {"xllm_class": "offline"}),
        ({OBJECTIVE: "chat"}, {"xllm_class": "online"}),
        ({OBJECTIVE: "unmapped"}, {"xllm_class": "online"}),
        ({OBJECTIVE: ""}, {}),
        ({OLD_OBJECTIVE: "batch"}, {"xllm_class": "offline"}),
        ({OBJECTIVE: "chat", OLD_OBJECTIVE: "batch"}, {"xllm_class": "online"}),
        ({OBJECTIVE: "", OLD_OBJECTIVE: "batch"}, {"xllm_class": "offline"}),
        ({TTFT: "300", TPOT: "20.5"}, {"xllm_ttft_ms": 300.0, "xllm_tpot_ms": 20.5}),
        ({OLD_TTFT: "300", OLD_TPOT: "2e1"}, {"xllm_ttft_ms": 300.0, "xllm_tpot_ms": 20.0}),
        ({TTFT: "300", OLD_TTFT: "400"}, {"xllm_ttft_ms": 300.0}),
        ({TPOT: "30", OLD_TPOT: "40"}, {"xllm_tpot_ms": 30.0}),
        ({TTFT: "300", OLD_TPOT: "40"}, {"xllm_ttft_ms": 300.0, "xllm_tpot_ms": 40.0}),
        # An offline request has no SLO; to send one is no mistake.
        ({OBJECTIVE: "batch", TTFT: "300"}, {"xllm_class": "offline", "xllm_ttft_ms": 300.0}),
        ({"x-request-id": "7"}, {}),
    ],
)
def test_the_headers_of_a_gateway_fill_in_what_the_request_leaves_open(
    headers: dict[str, str], filled: dict[str, Any]
) -> None:
    assert complete_xargs(Said(headers=headers), SECTION) == (filled, None)


@pytest.mark.parametrize(
    ("said", "filled", "served"),
    [
        (
            Said({"xllm_class": "online", "xllm_tpot_ms": 7}, "flex", {OBJECTIVE: "batch"}),
            {"xllm_class": "online", "xllm_tpot_ms": 7},
            "default",
        ),
        (
            Said({"xllm_ttft_ms": 1}, None, {OBJECTIVE: "batch", TTFT: "300", TPOT: "30"}),
            {"xllm_class": "offline", "xllm_ttft_ms": 1, "xllm_tpot_ms": 30.0},
            None,
        ),
        (Said({}, "flex", {OBJECTIVE: "chat"}), {"xllm_class": "online"}, "default"),
        (Said({}, "default", {OBJECTIVE: "batch"}), {"xllm_class": "offline"}, "flex"),
        (
            Said({}, "priority", {TTFT: "300"}),
            {"xllm_class": "online", "xllm_ttft_ms": 300.0, "xllm_tpot_ms": 50.0},
            "priority",
        ),
    ],
)
def test_arguments_win_over_headers_and_headers_over_the_tier_value_by_value(
    said: Said, filled: dict[str, Any], served: str | None
) -> None:
    assert complete_xargs(said, SECTION) == (filled, served)


@pytest.mark.parametrize("header", [TTFT, OLD_TTFT, TPOT, OLD_TPOT])
@pytest.mark.parametrize("value", ["0", "-5", "fast", "", "nan", "inf"])
def test_an_slo_header_that_cannot_be_is_refused(header: str, value: str) -> None:
    refusal = refused(Said(headers={header: value}))
    assert str(refusal) == f"{header} is {value!r}; allowed is a number of milliseconds above 0."
    assert refusal.param == header


@pytest.mark.parametrize(
    "said",
    [
        Said({"xllm_ttft_ms": 1}, None, {OLD_TTFT: "x"}),
        Said({}, None, {TTFT: "1", OLD_TTFT: "x"}),
        Said({"xllm_class": "offline"}, None, {OLD_TTFT: "x"}),
    ],
)
def test_a_bad_header_is_refused_even_where_a_stronger_source_overrides_it(said: Said) -> None:
    assert refused(said).param == OLD_TTFT


@pytest.mark.parametrize("tier", ["fast", "", "FLEX", 1])
def test_a_tier_that_is_none_is_refused(tier: Any) -> None:
    refusal = refused(Said({}, tier))
    assert str(refusal) == (
        f"service_tier is {tier!r}; allowed is auto, default, flex, priority, scale, standard_only."
    )
    assert refusal.param == "service_tier"


@pytest.mark.parametrize("tier", [None, "default", "flex", "priority"])
def test_a_bad_value_is_refused_whatever_the_tier(tier: str | None) -> None:
    refusal = refused(Said({"xllm_tpot_ms": -1}, tier))
    assert str(refusal).startswith("xllm_tpot_ms is -1; ")
    assert refusal.param == "vllm_xargs"


@pytest.mark.parametrize(
    "said",
    [
        Said({"xllm_class": "offline"}, beam_search=True),
        Said({"xllm_ttft_ms": 300}, beam_search=True),
        Said({}, "flex", beam_search=True),
        Said({}, "priority", beam_search=True),
        Said({}, None, {OBJECTIVE: "batch"}, beam_search=True),
        Said({}, None, {OLD_TPOT: "20"}, beam_search=True),
    ],
)
def test_beam_search_is_refused_what_cannot_reach_it(said: Said) -> None:
    refusal = refused(said)
    assert str(refusal) == (
        "use_beam_search is True, and vLLM carries no class and no SLO to beam search; "
        "allowed is an online request with the default SLOs."
    )
    assert refusal.param == "use_beam_search"


@pytest.mark.parametrize(
    ("said", "served"),
    [
        (Said({"seed": 3}, beam_search=True), None),
        (Said({}, "auto", beam_search=True), "default"),
        (Said({}, None, {OBJECTIVE: "chat"}, beam_search=True), None),
    ],
)
def test_beam_search_is_served_what_it_gets_anyway(said: Said, served: str | None) -> None:
    assert complete_xargs(said, SECTION)[1] == served
