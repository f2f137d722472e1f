"""Loads of MoE experts over time: power laws that stand still, drift, switch, and are noisy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xllm_eplb.placement import Topology
from xllm_eplb.search import Floats, Ints


@dataclass(frozen=True)
class Model:
    """A model on a machine.

    Attributes:
        name: of both.
        layers: MoE layers.
        experts: of a layer.
        chosen: experts that a token is routed to.
        hidden, intermediate: of an expert's three matrices.
        weight_bytes: of one weight.
        topology: the machine's.
    """

    name: str
    layers: int
    experts: int
    chosen: int
    hidden: int
    intermediate: int
    weight_bytes: int
    topology: Topology

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights."""
        return 3 * self.hidden * self.intermediate * self.weight_bytes

    def first(self) -> Ints:
        """VLLM's first placement."""
        slots = np.arange(self.topology.physical) % self.experts
        return np.tile(slots, (self.layers, 1))


DEEPSEEK_V3 = Model("DeepSeek-V3, EP 32", 58, 256, 8, 7168, 2048, 1, Topology(32, 9, 4))
QWEN3_30B = Model("Qwen3-30B-A3B, EP 8", 48, 128, 8, 2048, 768, 2, Topology(8, 18))
MODELS = {"deepseek-v3": DEEPSEEK_V3, "qwen3-30b-a3b": QWEN3_30B}


@dataclass(frozen=True)
class Traffic:
    """A course of expected loads, and what a window's counts add to them.

    Attributes:
        exponent: of the power law; 0 for even loads. Each layer and topic orders experts anew.
        noise: relative standard deviation of an expert's load in a window, beside that of counting.
        switch_every: windows after which a topic gives way to another; 0 for never.
        drift: whether one topic turns into another over the whole course.
    """

    exponent: float
    noise: float = 0.0
    switch_every: int = 0
    drift: bool = False

    def windows(self, model: Model, count: int, tokens: float, seed: int) -> Iterator[Floats]:
        """Counts ``[layers, experts]``, ``tokens`` of them in each layer on average."""
        rng = np.random.default_rng(seed)
        topic, other = self._topic(model, rng), self._topic(model, rng)
        for window in range(count):
            if self.switch_every and window and window % self.switch_every == 0:
                topic = self._topic(model, rng)
            mix = window / max(count - 1, 1) if self.drift else 0.0
            share = (1.0 - mix) * topic + mix * other
            loud = np.maximum(rng.normal(1.0, self.noise, share.shape), 0.0) * share
            yield rng.poisson(tokens * loud).astype(float)

    def _topic(self, model: Model, rng: np.random.Generator) -> Floats:
        law = np.arange(1, model.experts + 1) ** -self.exponent
        order = np.argsort(rng.random((model.layers, model.experts)), 1)
        shares: Floats = (law / law.sum())[order]
        return shares
