"""Settings of the expert load balancer."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_eplb.phases import Phase
from xllm_eplb.policy import Rules
from xllm_plugins.config import Section, option


@dataclass(frozen=True)
class EplbSection(Section):
    """The ``eplb`` section."""

    phase: Phase = option(
        Phase.ALL, "the steps that experts are balanced for: all, or those that mostly do one of it"
    )
    wanted: float = option(
        1.005,
        "max/mean device load that a plan aims at; more of it costs fewer moves",
        at_least=1.0,
    )
    least_gain: float = option(
        0.01, "gain of max/mean below which a layer is left alone", at_least=0.0
    )
    noise_errors: float = option(
        2.5, "standard errors of the forecast by which a gain is discounted", at_least=0.0
    )
    decay: float = option(
        0.8, "weight of earlier windows when one more has been seen", at_least=0.0, at_most=0.99
    )
    cosine: float = option(
        1.0,
        "a layer whose load is at least so similar to the one it was planned for is left alone, as "
        "in xLLM; 1 for no such test",
        at_least=0.0,
        at_most=1.0,
    )
    horizon_steps: int = option(3000, "engine steps within which a move has to pay", at_least=1)
    cost_factor: float = option(1.5, "what a move has to save, times its cost", at_least=0.0)
    most_moves: int = option(
        0, "experts that may move in one rearrangement; 0 for no bound", at_least=0
    )
    device_tflops: float = option(
        400.0, "what a device reaches in experts' matrix products, TFLOP/s", above=0.0
    )
    memory_gb_s: float = option(3000.0, "what a device reaches in reading weights, GB/s", above=0.0)
    link_gb_s: float = option(40.0, "what a device receives from others, GB/s", above=0.0)
    async_exposed: float = option(
        0.2,
        "share of a transfer by which steps become longer when vLLM moves experts asynchronously",
        at_least=0.0,
        at_most=1.0,
    )
    on_cpu: bool = option(
        False, "for development: expert parallelism and EPLB on vLLM's CPU platform"
    )

    def rules(self) -> Rules:
        """What is worth a move."""
        return Rules(
            wanted=self.wanted,
            least_gain=self.least_gain,
            noise_errors=self.noise_errors,
            decay=self.decay,
            cosine=None if self.cosine >= 1.0 else self.cosine,
            horizon_steps=self.horizon_steps,
            cost_factor=self.cost_factor,
            most_moves=self.most_moves or None,
        )
