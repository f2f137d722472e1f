"""Seam: expert parallelism and EPLB on vLLM's CPU platform, a development aid.

vLLM has neither there: its configuration refuses EPLB, the experts' kernel reads beyond the experts
that a rank holds, the router neither maps nor counts, the model runner makes no EPLB state, and
moves are timed with an event of a device. Each is put right around vLLM's own code, so that experts
really move between processes, over gloo. Ranks are those of tensor parallelism.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported

WHY = "vLLM's CPU platform has no expert parallelism and refuses EPLB."
WITHOUT = "eplb.on_cpu changes nothing, so vLLM refuses EPLB on a CPU."
HOLDS_FOR = ">=0.32,<0.33"
_RUNNER = "vllm.v1.worker.cpu_model_runner"
_KERNEL = "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply"
_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"
_STATE = "vllm.distributed.eplb.eplb_state"
_MAP = (
    "topk_ids", "expert_load_view", "logical_to_physical_map", "logical_replica_count",
    "record_enabled", "num_unpadded_tokens",
)  # fmt: skip
SEAM = (
    Target("vllm.config.parallel:current_platform"),
    Target("vllm.config.parallel:EPLBConfig"),
    Target(f"{_RUNNER}:CPUModelRunner.load_model", ("self",)),
    Target(_KERNEL, ("topk_weights", "topk_ids", "expert_map")),
    Target(f"{_ROUTER}:eplb_map_to_physical_and_record", _MAP),
    Target(f"{_STATE}:EplbState", ("parallel_config", "device")),
    Target(f"{_STATE}:EplbState.add_model", ("self", "model", "model_config")),
    Target("vllm.model_executor.models.interfaces:get_mixture_of_experts_model", ("model",)),
)
_KNUTH, _WORD = 2654435769, 0xFFFFFFFF  # with which vLLM spreads tokens over replicas


class _Permissive:
    """The platform, but for the one question whose answer lets a configuration have EPLB."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        return True


def allow(eplb_config: Any) -> Any:
    """Let this process configure EPLB on a CPU.

    Returns:
        The user's ``EPLBConfig`` with what a CPU can do: synchronous moves by vLLM's communicator
        for ``torch.distributed``, which takes the CPU's group for tensors there.
    """
    import vllm.config.parallel as module

    if not isinstance(module.current_platform, _Permissive):
        # Only the check for EPLB asks this module's platform whether it is like CUDA.
        module.current_platform = _Permissive(module.current_platform)
    values = {name: getattr(eplb_config, name) for name in type(eplb_config).__annotations__}
    return module.EPLBConfig(**{**values, "use_async": False, "communicator": "torch_nccl"})


def is_cpu() -> bool:
    """Whether vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def install(wanted: Callable[[Any], bool]) -> None:
    """Make workers on a CPU fit, if ``wanted`` says so of their configuration."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not wanted(self.vllm_config):
                return original(self, *args, **kwargs)
            _fit_worker()
            loaded = original(self, *args, **kwargs)
            _add_state(self)
            return loaded

        return load_model

    def patch_runner(module: ModuleType) -> None:
        patch(module.CPUModelRunner, "load_model", wrap, "eplb_cpu")

    when_imported(_RUNNER, patch_runner)


def _fit_worker() -> None:
    import vllm.distributed.eplb.eplb_state as state
    import vllm.model_executor.layers.fused_moe.router.base_router as router
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    patch(CPUUnquantizedExperts, "apply", _local_experts, "eplb_cpu")
    router.eplb_map_to_physical_and_record = map_and_record
    state.torch = _TorchWithClock(state.torch)


def _add_state(runner: Any) -> None:
    """As vLLM's runner for GPUs does once it has loaded the model."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    runner._moe_model = get_mixture_of_experts_model(runner.model)
    if runner._moe_model is not None:
        runner.eplb_state = EplbState(runner.parallel_config, runner.device)
        runner.eplb_state.add_model(runner._moe_model, runner.model_config)


def _local_experts(original: Any) -> Any:
    """The kernel, given this rank's numbers of experts; what others compute counts nothing here."""
    import inspect

    signature = inspect.signature(original)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        experts = given["expert_map"]
        if experts is not None:
            ids, weights = given["topk_ids"], given["topk_weights"]
            local = experts[ids.long()]
            elsewhere = local < 0
            given["topk_ids"] = local.masked_fill(elsewhere, 0).to(ids.dtype).contiguous()
            given["topk_weights"] = weights.masked_fill(elsewhere, 0.0).contiguous()
            given["expert_map"] = None
        return original(**given)

    return apply


def map_and_record(
    topk_ids: Any,
    expert_load_view: Any,
    logical_to_physical_map: Any,
    logical_replica_count: Any,
    record_enabled: Any,
    num_unpadded_tokens: Any = None,
) -> Any:
    """The slot for each token and chosen expert, ``[tokens, chosen]``, as vLLM's Triton kernel.

    ``expert_load_view`` ``[slots]`` counts the tokens of each slot, padding aside.
    """
    import torch

    experts = topk_ids.long()
    tokens = torch.arange(len(experts)).unsqueeze(-1)
    replica = ((tokens * _KNUTH) & _WORD) % logical_replica_count[experts].clamp(min=1)
    slots = logical_to_physical_map[experts, replica]
    if bool(record_enabled):
        real = len(slots) if num_unpadded_tokens is None else int(num_unpadded_tokens)
        counted = slots[:real].flatten()
        expert_load_view += torch.bincount(counted, minlength=len(expert_load_view))
    return slots.to(topk_ids.dtype)


class _Clock:
    """What of ``torch.Event`` measures time."""

    def __init__(self, enable_timing: bool = True) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs behind the CPU's back."""

    def elapsed_time(self, end: _Clock) -> float:
        """Milliseconds."""
        return (end._at - self._at) * 1e3


class _TorchWithClock:
    """``torch`` for one module, with events that need no device."""

    Event = _Clock

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)
