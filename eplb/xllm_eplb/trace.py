"""Windows of expert loads as a server saw them, in a file: one on each line, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xllm_eplb.errors import PlacementError
from xllm_eplb.phases import Phase, Prefill
from xllm_eplb.placement import Topology
from xllm_eplb.policy import Costs
from xllm_eplb.search import Floats, Ints


@dataclass(frozen=True)
class Machine:
    """What moving and computing experts depends on.

    Attributes:
        steps: engine steps that a call's statistics cover.
        expert_bytes: of one expert's weights.
        expert_weights: their number.
        flops: that a device reaches, per second.
        memory_bytes: that it reads, per second.
        link_bytes: that it receives, per second.
        exposed: share of a transfer by which steps become longer.
    """

    steps: int
    expert_bytes: float
    expert_weights: float
    flops: float
    memory_bytes: float
    link_bytes: float
    exposed: float

    def costs(self, slots: int) -> Costs:
        """With so many experts on a device."""
        return Costs(
            token_s=2.0 * self.expert_weights / self.flops,
            floor_s=slots * self.expert_bytes / self.memory_bytes,
            move_s=self.expert_bytes / self.link_bytes,
            exposed=self.exposed,
        )


class Part(NamedTuple):
    """The steps of a window that are of one phase.

    Attributes:
        load: tokens of each expert, ``[layers, experts]``.
        steps: their number, at least 1.
        share: of the window's steps.
    """

    load: Floats
    steps: int
    share: float


@dataclass(frozen=True)
class Window:
    """One window, as it was planned from.

    Attributes:
        plan: its number, from 1.
        machine: that served.
        topology: of it.
        load: tokens of each expert, ``[layers, experts]``.
        placement: in which they were counted, ``[layers, devices * slots]``.
        prefill: what of it prefill steps had; None where that is not known.
    """

    plan: int
    machine: Machine
    topology: Topology
    load: Floats
    placement: Ints
    prefill: Prefill | None = None

    def of(self, phase: Phase) -> Part:
        """One phase; all steps where phases are not known."""
        if phase is Phase.ALL or self.prefill is None:
            return Part(self.load, self.machine.steps, 1.0)
        load, share = self.prefill.load, self.prefill.share
        if phase is Phase.DECODE:
            load, share = self.load - load, 1.0 - share
        return Part(load, max(1, round(self.machine.steps * share)), share)

    def plain(self) -> dict[str, Any]:
        """In plain JSON types."""
        made = {
            "plan": self.plan,
            "machine": asdict(self.machine),
            "topology": asdict(self.topology),
            "load": _counts(self.load),
            "placement": self.placement.tolist(),
        }
        if self.prefill is not None:
            made["prefill"] = {
                "load": _counts(self.prefill.load), "share": round(self.prefill.share, 6),
            }  # fmt: skip
        return made


def window_of(plain: Mapping[str, Any]) -> Window:
    """A window out of what ``Window.plain`` made.

    Raises:
        PlacementError: something is missing, or of another shape.
    """
    try:
        prefill = plain.get("prefill")
        window = Window(
            int(plain["plan"]),
            Machine(**plain["machine"]),
            Topology(**plain["topology"]),
            np.array(plain["load"], float),
            np.array(plain["placement"], np.int64),
            None if prefill is None else _prefill_of(prefill),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PlacementError(f"A line is no window of expert loads: {error!r}.") from error
    shapes = {window.load.shape, window.of(Phase.PREFILL).load.shape}
    expected = (len(window.load), window.topology.physical)
    if window.load.ndim != 2 or len(shapes) > 1 or window.placement.shape != expected:
        raise PlacementError(
            f"Window {window.plan} has loads {window.load.shape} and a placement "
            f"{window.placement.shape}; allowed is [layers, experts] and "
            f"[layers, {window.topology.physical}]."
        )
    return window


def _prefill_of(plain: Mapping[str, Any]) -> Prefill:
    return Prefill(np.array(plain["load"], float), float(plain["share"]))


def _counts(load: Floats) -> list[list[int]]:
    counts: list[list[int]] = np.rint(load).astype(int).tolist()
    return counts


def read_trace(path: Path) -> list[Window]:
    """The windows of a file, in order.

    Raises:
        PlacementError: the file is not there, or holds something else, or no two windows alike.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        windows = [window_of(json.loads(line)) for line in lines]
    except (OSError, json.JSONDecodeError) as error:
        raise PlacementError(f"{path} is no trace of expert loads: {error}.") from error
    if len(windows) < 2 or len({(w.load.shape, w.topology) for w in windows}) > 1:
        raise PlacementError(
            f"{path} holds {len(windows)} windows; allowed are two or more of one model on one "
            "machine, since each plan is scored on the window after it."
        )
    return windows


def lines_of(windows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Plain windows as lines of a file."""
    return (json.dumps(window, separators=(",", ":")) + "\n" for window in windows)
