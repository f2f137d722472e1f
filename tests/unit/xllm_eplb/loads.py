"""Loads and placements that the tests of this part share."""

from __future__ import annotations

import numpy as np

from xllm_eplb.search import Floats, Ints


def initial(layers: int, experts: int, slots: int) -> Ints:
    """vLLM's first placement: all experts in order, then the first of them again."""
    return np.tile(np.arange(slots) % experts, (layers, 1))


def skewed(layers: int, experts: int, exponent: float = 0.6, seed: int = 0) -> Floats:
    """Power-law loads, another order of the experts in each layer."""
    rng = np.random.default_rng(seed)
    law = 1000.0 * np.arange(1, experts + 1) ** -exponent
    return np.stack([rng.permutation(law) for _ in range(layers)])
