"""Selecting features with ``--plugins``, and the table that start-up prints."""

from __future__ import annotations

import pytest

from xllm_plugins.config import Mode, Section
from xllm_plugins.errors import ConfigError
from xllm_plugins.features import (
    Decision,
    Feature,
    as_report,
    parse_selection,
    standing_reason,
    table,
)

KNOWN = ("scheduler", "kv", "eplb")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("xllm", {"scheduler", "kv", "eplb"}),
        ("xllm.kv", {"kv"}),
        ("xllm.kv,xllm.eplb", {"kv", "eplb"}),
        ("xllm,-xllm.eplb", {"scheduler", "kv"}),
        ("-xllm.eplb,xllm", {"scheduler", "kv"}),
        ("xllm,-xllm.eplb,-xllm.kv", {"scheduler"}),
        ("xllm.kv,xllm.eplb,-xllm.kv", {"eplb"}),
        ("xllm.kv,xllm.kv", {"kv"}),
        ("xllm,xllm.kv", {"scheduler", "kv", "eplb"}),
        (" xllm , -xllm.kv ,", {"scheduler", "eplb"}),
    ],
)
def test_a_selection_names_features(text: str, names: set[str]) -> None:
    selection = parse_selection(text, KNOWN)
    assert {name for name in KNOWN if name in selection} == names
    assert selection.names == names


@pytest.mark.parametrize("text", ["", " , ", "-xllm.kv", "xllm.kv,-xllm.kv"])
def test_a_selection_that_switches_nothing_on_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_selection(text, KNOWN)
    assert str(caught.value) == (
        f"--plugins is {text!r}, which switches nothing on; allowed is xllm, xllm.NAME or "
        "xllm,-xllm.NAME with NAME of eplb, kv, scheduler."
    )


@pytest.mark.parametrize(
    ("text", "token", "nearest"),
    [
        ("xllm.sheduler", "xllm.sheduler", "xllm.scheduler"),
        ("xllm,-xllm.epbl", "-xllm.epbl", "-xllm.eplb"),
        ("xlm", "xlm", "xllm"),
        ("kv", "kv", "xllm.kv"),
        ("xllm.", "xllm.", "xllm"),
        ("-xllm", "-xllm", "xllm"),
        ("XLLM.kv", "XLLM.kv", "xllm.kv"),
        ("--xllm.kv", "--xllm.kv", "-xllm.kv"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(
    text: str, token: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_selection(text, KNOWN)
    assert str(caught.value) == (
        f"--plugins names {token!r}, which is not known; the nearest is {nearest}, allowed are "
        "xllm, xllm.eplb, xllm.kv, xllm.scheduler, -xllm.eplb, -xllm.kv, -xllm.scheduler."
    )


@pytest.mark.parametrize(
    ("selected", "mode", "reason"),
    [
        ("xllm.kv", Mode.AUTO, ""),
        ("xllm.kv", Mode.ON, ""),
        ("xllm.kv", Mode.OFF, "kv.mode is off"),
        ("xllm.eplb", Mode.ON, "not selected"),
        ("xllm.eplb", Mode.OFF, "not selected"),
    ],
)
def test_a_feature_stands_by_unless_selected_and_not_off(
    selected: str, mode: Mode, reason: str
) -> None:
    feature = Feature("kv", "", Section, lambda _: "")
    assert standing_reason(feature, Section(mode), parse_selection(selected, KNOWN)) == reason


DECISIONS = [
    Decision("scheduler", "auto", True, "its conditions hold", "vllm.Scheduler"),
    Decision("kv", "off", False, "kv.mode is off"),
]


def test_the_table_aligns_and_gives_every_decision_its_reason() -> None:
    assert table(DECISIONS).splitlines() == [
        "feature    mode  active  attached to     why",
        "scheduler  auto  yes     vllm.Scheduler  its conditions hold",
        "kv         off   no      -               kv.mode is off",
    ]


def test_the_report_is_the_table_in_plain_types() -> None:
    assert as_report(DECISIONS)[1] == {
        "feature": "kv",
        "mode": "off",
        "active": False,
        "reason": "kv.mode is off",
        "attached_to": "",
    }
