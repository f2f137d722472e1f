"""A pytest plugin for vLLM's tests of its EPLB policy: plans with ours. See ``eplb.py``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_planned: list[bool] = []  # of each placement that a test asked for: whether ours planned it


def pytest_configure() -> None:
    """Substitute before the tests import the class."""
    import torch
    from vllm.distributed.eplb.policy import default

    from xllm_eplb.balancer import Balancer
    from xllm_eplb.policy import Rules
    from xllm_eplb.trace import Machine
    from xllm_plugins.compat.eplb_policy import policy_class

    # Moving costs nothing there, and the loads are small numbers on purpose.
    machine = Machine(1, 1.0, 1.0, 1.0, 1e30, 1e30, 1.0)

    def rebalance(*arguments: Any) -> Any:
        found = Balancer(Rules(), machine).rebalance(*arguments)
        _planned.append(found is not None)
        return found

    ours: Any = policy_class(rebalance)

    class Ours(default.DefaultEplbPolicy):  # type: ignore[misc]
        """Plans from an empty machine where a test has no placement, as none of vLLM's calls."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            groups: int,
            nodes: int,
            ranks: int,
            old: Any = None,
        ) -> Any:
            if old is None:
                old = torch.full((len(weight), num_replicas), -1)
            return ours.rebalance_experts(weight, num_replicas, groups, nodes, ranks, old)

    default.DefaultEplbPolicy = Ours


def pytest_unconfigure() -> None:
    """Say who planned."""
    Path(os.environ["XLLM_PLANNED"]).write_text(json.dumps(_planned), encoding="utf-8")
