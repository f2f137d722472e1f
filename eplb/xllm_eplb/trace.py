"""Windows of expert loads as a server saw them, in a file: one on each line, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xllm_eplb.errors import PlacementError
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


@dataclass(frozen=True)
class Window:
    """One window, as it was planned from.

    Attributes:
        plan: its number, from 1.
        machine: that served.
        topology: of it.
        load: tokens of each expert, ``[layers, experts]``.
        placement: in which they were counted, ``[layers, devices * slots]``.
    """

    plan: int
    machine: Machine
    topology: Topology
    load: Floats
    placement: Ints

    def plain(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "plan": self.plan,
            "machine": asdict(self.machine),
            "topology": asdict(self.topology),
            "load": np.rint(self.load).astype(int).tolist(),
            "placement": self.placement.tolist(),
        }


def window_of(plain: Mapping[str, Any]) -> Window:
    """A window out of what ``Window.plain`` made.

    Raises:
        PlacementError: something is missing, or of another shape.
    """
    try:
        window = Window(
            int(plain["plan"]),
            Machine(**plain["machine"]),
            Topology(**plain["topology"]),
            np.array(plain["load"], float),
            np.array(plain["placement"], np.int64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PlacementError(f"A line is no window of expert loads: {error!r}.") from error
    if window.load.ndim != 2 or window.placement.shape != (
        len(window.load),
        window.topology.physical,
    ):
        raise PlacementError(
            f"Window {window.plan} has loads {window.load.shape} and a placement "
            f"{window.placement.shape}; allowed is [layers, experts] and "
            f"[layers, {window.topology.physical}]."
        )
    return window


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
