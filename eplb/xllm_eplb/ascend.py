"""Between vllm-ascend's tables of slots and the balancer, which knows experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from xllm_eplb.balancer import Balancer
from xllm_eplb.search import Floats, Ints

_ONE_NODE, _ONE_GROUP = 1, 1  # vllm-ascend names neither nodes nor groups of experts


def replan(balancer: Balancer, table: Ints, load: Ints) -> Ints:
    """The experts from now on, ``[layers, devices, slots]``; those of now where nothing is planned.

    Args:
        balancer: of this model.
        table: the expert in each slot now, -1 in a slot that holds none.
        load: tokens that each slot got in the window, of the same shape.
    """
    layers, devices, slots = table.shape
    current = table.reshape(layers, devices * slots)
    found = balancer.rebalance(
        expert_load(current, load.reshape(current.shape)),
        devices * slots, _ONE_GROUP, _ONE_NODE, devices, current.copy(),
    )  # fmt: skip
    return (current if found is None else found).reshape(table.shape).copy()


def expert_load(placement: Ints, load: Ints) -> Floats:
    """``[layers, experts]``: tokens of each expert, those of all its slots together.

    Args:
        placement: ``[layers, all slots]``, the expert in each slot, -1 in an empty one.
        load: tokens of each slot, of the same shape.
    """
    layers, experts = len(placement), int(placement.max()) + 1
    ids = np.where(placement < 0, experts, placement) + np.arange(layers)[:, None] * (experts + 1)
    tokens: Any = np.bincount(ids.ravel(), load.ravel(), minlength=layers * (experts + 1))
    by_expert: Floats = tokens.reshape(layers, experts + 1)[:, :experts]
    return by_expert
