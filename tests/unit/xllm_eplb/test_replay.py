"""Recorded loads come back as they were, and every rule is scored on the window after its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.xllm_eplb.loads import initial, skewed
from xllm_eplb.balancer import Balancer
from xllm_eplb.errors import PlacementError
from xllm_eplb.phases import Phase, Prefill
from xllm_eplb.placement import Topology
from xllm_eplb.policy import Rules
from xllm_eplb.replay import device_shares, ours, replayed, untouched
from xllm_eplb.search import Ints
from xllm_eplb.trace import Machine, Window, lines_of, read_trace, window_of
from xllm_plugins import cli

MACHINE = Machine(100, 40e6, 40e6, 400e12, 3e12, 40e9, 1.0)
TOPOLOGY = Topology(8, 9)
FIRST = initial(3, 64, 72)
LOAD = np.round(skewed(3, 64) * 1e4)
PREFILL = Prefill(np.minimum(LOAD, np.round(skewed(3, 64, seed=2) * 1e4)), 0.25)


def windows(count: int = 3) -> list[Window]:
    return [Window(plan, MACHINE, TOPOLOGY, LOAD, FIRST, PREFILL) for plan in range(1, count + 1)]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(lines_of(one.plain() for one in windows())))
    return path


def test_a_trace_comes_back_as_it_was(trace: Path) -> None:
    for read, written in zip(read_trace(trace), windows(), strict=True):
        assert (read.plan, read.machine, read.topology) == (written.plan, MACHINE, TOPOLOGY)
        assert read.load.tolist() == LOAD.tolist()
        assert read.placement.tolist() == FIRST.tolist()
        assert read.prefill is not None
        assert (read.prefill.load.tolist(), read.prefill.share) == (PREFILL.load.tolist(), 0.25)


def test_a_balancer_keeps_what_it_planned_from() -> None:
    balancer = Balancer(Rules(), MACHINE)
    for _ in range(20):
        balancer.rebalance(LOAD, 72, 1, 1, 8, FIRST)
    assert [one["plan"] for one in balancer.windows(0)] == list(range(5, 21))
    assert [one["plan"] for one in balancer.windows(18)] == [19, 20]
    assert window_of(balancer.windows(19)[0]).topology == TOPOLOGY


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "A line is no window of expert loads: KeyError('plan')."),
        ("no JSON", "is no trace of expert loads: Expecting value"),
        ("", "holds 0 windows; allowed are two or more of one model"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(PlacementError) as raised:
        read_trace(path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    "other", [{"placement": [[0, 1]] * 3}, {"prefill": {"load": [[0]] * 3, "share": 0.5}}]
)
def test_a_window_of_several_shapes_is_refused(other: dict[str, Any]) -> None:
    plain = {**windows()[0].plain(), **other}
    with pytest.raises(PlacementError, match=r"Window 1 has loads \(3, 64\) and a placement"):
        window_of(plain)


def test_a_window_from_before_phases_were_known_is_read() -> None:
    plain = windows()[0].plain()
    del plain["prefill"]
    assert window_of(plain).of(Phase.DECODE).load.tolist() == LOAD.tolist()


def test_a_plan_is_scored_on_the_window_after_it() -> None:
    other = Window(2, MACHINE, TOPOLOGY, LOAD[:, ::-1].copy(), FIRST)
    seen: list[int] = []

    def rule(window: Window, current: Ints) -> Ints:
        seen.append(window.plan)
        return current

    found = replayed([windows()[0], other], rule, lambda: 0.0)
    assert seen == [1]
    assert found.balance == pytest.approx(device_shares(other).max(1).mean())
    assert (found.moves, found.plan_ms) == (0.0, 0.0)


def test_ours_balances_what_stands_still() -> None:
    ticks = iter(range(100))
    none, mine = (
        replayed(windows(), rule, lambda: next(ticks))
        for rule in (untouched, ours(Rules(), windows()[0]))
    )
    assert none.balance > 1.2
    assert mine.balance < 1.03
    assert 0.0 < mine.moves < 0.3
    assert mine.plan_ms == 1000.0


def test_a_plan_for_one_phase_is_better_in_its_steps() -> None:
    found = {
        phase: replayed(windows(), ours(Rules(), windows()[0], phase), lambda: 0.0)
        for phase in (Phase.ALL, Phase.DECODE)
    }
    scores = [found[phase].phases["decode"] for phase in found]
    assert scores[1] < scores[0] - 0.05
    assert found[Phase.DECODE].balance > found[Phase.ALL].balance


def test_the_command_compares_rules(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    more = ["--ours", "wanted=1.1,most_moves=1", "--ours", "phase=decode", "--json", str(figures)]
    assert cli.main(["eplb", "replay", str(trace), *more]) == 0
    found = json.loads(figures.read_text())
    assert {"none", "ours", "ours wanted=1.1,most_moves=1"} <= found.keys()
    assert found["ours"]["balance"] < found["none"]["balance"]
    assert found["ours wanted=1.1,most_moves=1"]["moves"] <= 1 / FIRST.size
    assert found["ours phase=decode"]["phases"]["decode"] < found["ours"]["phases"]["decode"]
    said = capsys.readouterr().out
    assert "3 windows of 3 layers, 64 experts on 8 devices with 9 slots" in said
    assert "max/mean   prefill    decode  moved/plan" in said


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ("wanted=much", "eplb.wanted from --ours is 'much'; allowed is a number at least 1."),
        ("wanted=0.5", "eplb.wanted from --ours is 0.5"),
        ("phase=later", "eplb.phase from --ours is 'later'; allowed is all, decode, prefill."),
    ],
)
def test_a_wrong_setting_is_one_line(
    variant: str, sentence: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eplb", "replay", str(trace), "--ours", variant]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_draws(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.svg"
    assert cli.main(["eplb", "plot", str(trace), str(picture)]) == 0
    assert picture.read_text().count("<image") == 3  # two heat maps and their scale
    assert cli.main(["eplb", "plot", str(trace), str(tmp_path / "picture.bmp2")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:9", "gives no loads"),
        ("ftp://here", "allowed is an address with http:// or https://"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(
    url: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eplb", "record", url, str(tmp_path / "out"), "--seconds", "1"]) == 2
    assert sentence in capsys.readouterr().err
