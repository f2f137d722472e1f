"""Seam: let another policy plan where vLLM's EPLB puts experts.

vLLM looks a policy up by name in a table that its configuration allows one name of. ``add_model``
reads it; it is wrapped, and the policy of that one state replaced afterwards, so that the name
stays ``default``, which asynchronous EPLB insists on.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported

WHY = "vLLM's table of EPLB policies is closed: its option allows the default alone."
WITHOUT = "xllm.eplb is off: vLLM's policy plans."
HOLDS_FOR = ">=0.23,<0.33"
_EPLB = "vllm.distributed.eplb"
SEAM = (
    Target(f"{_EPLB}.eplb_state:EplbState.add_model", ("self", "model", "model_config")),
    Target(f"{_EPLB}.eplb_state:EplbState.rearrange", ("self", "is_profile")),
    Target(
        f"{_EPLB}.policy.abstract:AbstractEplbPolicy.rebalance_experts",
        (
            "weight", "num_replicas", "num_groups", "num_nodes", "num_ranks",
            "old_global_expert_indices",
        ),
    ),
    Target(f"{_EPLB}.policy:DefaultEplbPolicy.rebalance_experts"),
    Target(f"{_EPLB}.policy:EPLB_POLICIES"),
    Target("vllm.config.vllm:get_current_vllm_config_or_none"),
)  # fmt: skip
logger = logging.getLogger("vllm.xllm_plugins")


class Experts(NamedTuple):
    """What a worker knows of the experts that it holds: bytes and number of one's weights."""

    bytes: float
    weights: float


Rebalance = Callable[[Any, int, int, int, int, Any], Any]
"""``(load, slots, groups, nodes, devices, current)``, arrays of numpy, to a placement or None."""
Make = Callable[[Any, Experts], Rebalance | None]
"""Given vLLM's configuration and the experts' size, the planner; None to leave vLLM's."""


def install(make: Make, stalled: Callable[[float], None], begins: Callable[[Any], None]) -> None:
    """Have ``make`` asked for a planner whenever vLLM's EPLB takes a model.

    ``begins`` is told, on every rank, the ``EplbState`` that will plan from the window it has, or
    None if it plans from something else.
    ``stalled`` is told for how many seconds an engine stood still to rearrange; where vLLM moves
    experts asynchronously, to begin with it.
    """

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def add_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            added = original(self, model, *args, **kwargs)
            _replace_policy(self, model, make)
            return added

        return add_model

    def wrap_rearrange(original: Any) -> Any:
        @functools.wraps(original)
        def rearrange(self: Any, is_profile: bool = False, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            begins(None if is_profile or args or kwargs else self)
            found = original(self, is_profile, *args, **kwargs)
            if not is_profile:
                stalled(time.perf_counter() - started)
            return found

        return rearrange

    def patch_state(module: ModuleType) -> None:
        patch(module.EplbState, "add_model", wrap, "eplb_policy")
        patch(module.EplbState, "rearrange", wrap_rearrange, "eplb_policy")

    when_imported(f"{_EPLB}.eplb_state", patch_state)


def _replace_policy(state: Any, model: Any, make: Make) -> None:
    from vllm.config.vllm import get_current_vllm_config_or_none
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    config = get_current_vllm_config_or_none()
    if config is None:
        logger.warning("vLLM's EPLB took a model outside of any configuration: its policy stays.")
        return
    if state.policy is not DefaultEplbPolicy:
        logger.warning("The EPLB policy %s is not vLLM's: it stays.", state.policy.__qualname__)
        return
    rebalance = make(config, _experts(model))
    if rebalance is not None:
        state.policy = policy_class(rebalance)


def _experts(model: Any) -> Experts:
    tensors = list(next(iter(model.expert_weights)))
    held = tensors[0].shape[0]
    return Experts(
        sum(tensor.numel() * tensor.element_size() for tensor in tensors) / held,
        sum(tensor.numel() for tensor in tensors) / held,
    )


def policy_class(rebalance: Rebalance) -> type:
    """A policy by vLLM's contract that asks ``rebalance``, and vLLM's default where it has none."""
    import torch
    from vllm.distributed.eplb.policy import AbstractEplbPolicy, DefaultEplbPolicy

    class XllmEplbPolicy(AbstractEplbPolicy):  # type: ignore[misc]
        """Called by every rank with the same tensors; all have to return the same."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: torch.Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """``[layers, num_replicas]``: the expert in each slot."""
            found = None
            if old_global_expert_indices is not None:
                found = rebalance(
                    weight.to(torch.float64).cpu().numpy(),
                    num_replicas,
                    num_groups,
                    num_nodes,
                    num_ranks,
                    # A copy: where vLLM keeps it on a CPU, it goes on changing.
                    old_global_expert_indices.to(torch.int64).cpu().numpy().copy(),
                )
            if found is None:
                return DefaultEplbPolicy.rebalance_experts(
                    weight, num_replicas, num_groups, num_nodes, num_ranks,
                    old_global_expert_indices,
                )  # fmt: skip
            return torch.from_numpy(found.copy())

    return XllmEplbPolicy


def default_plan(load: Any, current: Any, machine: Mapping[str, int]) -> Any:
    """What vLLM's default makes of an array of loads; ``machine`` is a topology in plain types."""
    import torch
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    return DefaultEplbPolicy.rebalance_experts(
        torch.from_numpy(load),
        machine["devices"] * machine["slots"],
        machine["groups"],
        machine["nodes"],
        machine["devices"],
        torch.from_numpy(current),
    ).numpy()


def ask_worker(engine_core: Any, ask: Callable[[Any], Any]) -> Any:
    """What ``ask`` finds in the first worker process of an engine."""
    return engine_core.model_executor.collective_rpc(ask)[0]
