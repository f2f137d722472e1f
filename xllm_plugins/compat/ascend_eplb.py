"""Seam: let another policy plan where vllm-ascend's EPLB puts experts.

vllm-ascend makes its policy from a number, by a table inside of a function that it looks up on a
class whenever a worker process is about to start its planner. That function is wrapped. The policy
is made in the worker and then forked into a child process, which plans for this one rank; all
ranks plan on the same loads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import ASCEND, Target, patch
from xllm_plugins.compat.eplb_policy import Experts
from xllm_plugins.compat.lazy import when_imported

UPSTREAM = ASCEND
WHY = "vllm-ascend's table of EPLB policies is closed."
WITHOUT = "vllm-ascend's own policy plans, and xllm.eplb is off."
HOLDS_FOR = ">=0.23,<0.24"
_CORE, _CONFIG = "vllm_ascend.eplb.core", "vllm_ascend.ascend_config"
_FACTORY = f"{_CORE}.policy.policy_factory"
SEAM = (
    Target(f"{_FACTORY}:PolicyFactory.generate_policy", ("policy_type",)),
    Target(
        f"{_CORE}.policy.policy_abstract:EplbPolicy.rebalance_experts",
        ("self", "current_expert_table", "expert_workload"),
    ),
    Target(
        f"{_CORE}.eplb_worker:EplbWorker.calculate_rebalance_experts",
        ("self", "load_info", "old_placement"),
    ),
    Target(f"{_CONFIG}:get_ascend_config"),
    Target(f"{_CONFIG}:EplbConfig"),
    Target("vllm.config.vllm:get_current_vllm_config_or_none"),
)

Replan = Callable[[Any, Any], Any]
"""``(table, load)``, both ``[layers, devices, slots]`` arrays of numpy, to another such table."""
Make = Callable[[Any], Replan | None]
"""Given vLLM's configuration, the planner; None to leave vllm-ascend's."""


def settings() -> Any | None:
    """vllm-ascend's ``ascend_config`` of this process; None on another platform."""
    module = sys.modules.get(_CONFIG)
    if module is None:
        return None
    try:
        return module.get_ascend_config()
    except RuntimeError:  # no configuration was built for an NPU
        return None


def install(make: Make) -> None:
    """Have ``make`` asked for a planner whenever vllm-ascend's EPLB makes its policy."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def generate_policy(policy_type: int) -> Any:
            from vllm.config.vllm import get_current_vllm_config_or_none

            config = get_current_vllm_config_or_none()
            replan = None if config is None else make(config)
            return original(policy_type) if replan is None else policy_of(replan)

        return generate_policy

    def patch_factory(module: ModuleType) -> None:
        patch(module.PolicyFactory, "generate_policy", wrap, "ascend_eplb")

    when_imported(_FACTORY, patch_factory)


def policy_of(replan: Replan) -> Any:
    """A policy by vllm-ascend's contract that asks ``replan``."""
    import torch
    from vllm_ascend.eplb.core.policy.policy_abstract import EplbPolicy

    class XllmEplbPolicy(EplbPolicy):  # type: ignore[misc]
        """Called in the planner process of each rank with the same tensors."""

        def rebalance_experts(
            self, current_expert_table: torch.Tensor, expert_workload: torch.Tensor
        ) -> tuple[bool, list[int], torch.Tensor]:
            """Whether anything moves, an order of layers that nobody reads, and the new table."""
            table = current_expert_table.numpy()
            found = replan(table, expert_workload.numpy())
            return bool((found != table).any()), [], torch.from_numpy(found)

    return XllmEplbPolicy()


def experts_of(vllm_config: Any) -> Experts:
    """The size of one expert by the model's configuration: nothing has been loaded yet."""
    model = vllm_config.model_config
    text = model.hf_text_config
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    weights = 3.0 * text.hidden_size * inner  # gate, up and down
    # vllm-ascend's quantized experts have 8 bits to a weight, some of them 4.
    return Experts(weights * (1 if model.quantization else model.dtype.itemsize), weights)
