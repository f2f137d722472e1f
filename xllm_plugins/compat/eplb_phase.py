"""Seam: the loads of those steps alone that compute prompts.

vLLM keeps the experts' loads of each step in a row of its window, but plans from their sum. What a
worker is told to compute is noted for the row that the step fills. Before a plan the rows of
prefill steps are added up over steps and ranks, as vLLM does with all of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported

WHY = "vLLM's EPLB adds up the loads of prefill and decode before its policy sees them."
WITHOUT = "xllm.eplb is off: vLLM's policy plans."
HOLDS_FOR = ">=0.23,<0.33"
_STATE, _WORKER = "vllm.distributed.eplb.eplb_state", "vllm.v1.worker.worker_base"
SEAM = (
    Target(f"{_WORKER}:WorkerWrapperBase.execute_model", ("self", "scheduler_output")),
    Target(f"{_STATE}:EplbState.step", ("self", "is_dummy", "is_profile", "log_stats")),
    Target(f"{_STATE}:EplbState._should_record_current_step", ("self", "log_stats")),
    Target(f"{_STATE}:EplbState._allreduce_list", ("self", "tensor_list")),
)
_DECODE, _PREFILL = 1, 2  # of a row; 0 while nothing is known of it
_ROWS = "_xllm_rows"
_computes = 0  # what this worker process was told last

IsPrefill = Callable[[Mapping[str, int], Mapping[str, Sequence[int]]], bool]
"""Given a step's tokens and its drafted ones, by request, whether it counts as prefill."""


def install(is_prefill: IsPrefill) -> None:
    """Note for each row of the window what its step computed."""

    def wrap_execute(original: Any) -> Any:
        @functools.wraps(original)
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            global _computes
            tokens = scheduler_output.num_scheduled_tokens
            drafts = scheduler_output.scheduled_spec_decode_tokens
            _computes = _PREFILL if is_prefill(tokens, drafts) else _DECODE
            return original(self, scheduler_output, *args, **kwargs)

        return execute_model

    def wrap_step(original: Any) -> Any:
        @functools.wraps(original)
        def step(
            self: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
        ) -> Any:
            if not (is_dummy or is_profile) and self._should_record_current_step(log_stats):
                _rows(self)[self.expert_load_window_step] = _computes
            return original(self, is_dummy, is_profile, log_stats)

        return step

    def patch_worker(module: ModuleType) -> None:
        patch(module.WorkerWrapperBase, "execute_model", wrap_execute, "eplb_phase")

    def patch_state(module: ModuleType) -> None:
        patch(module.EplbState, "step", wrap_step, "eplb_phase")

    when_imported(_WORKER, patch_worker)
    when_imported(_STATE, patch_state)


def prefill_loads(state: Any) -> list[tuple[NDArray[np.float64], float] | None]:
    """Of each model, tokens ``[layers, experts]`` in prefill steps, and their share of the steps.

    All ranks have to call it at once. None where no rank knows what its steps computed.
    """
    import torch

    rows = _rows(state)
    steps = [np.count_nonzero(rows == _PREFILL), np.count_nonzero(rows)]
    with _may_wait():
        chosen = torch.from_numpy(np.flatnonzero(rows == _PREFILL)).to(state.device)
        sums = []
        for one in state.model_states.values():
            load, experts = one.expert_load_window[chosen].sum(0), one.model.num_logical_experts
            slots = one.physical_to_logical_map[:, : load.shape[1]].long()
            # One column more for empty slots, two rows more for the steps.
            added = load.new_zeros(len(load) + 2, experts + 1)
            added[:-2].scatter_add_(1, slots.masked_fill(slots < 0, experts), load)
            added[-2:] = torch.tensor(steps, device=state.device)[:, None]
            sums.append(added[:, :experts].contiguous())
        found = [one.double().cpu().numpy() for one in state._allreduce_list(sums)]
    return [(one[:-2], float(one[-2, 0] / one[-1, 0])) if one[-1, 0] > 0 else None for one in found]


def _rows(state: Any) -> NDArray[np.int8]:
    """What each row of the window holds."""
    if not hasattr(state, _ROWS):
        setattr(state, _ROWS, np.zeros(state.expert_load_window_size, np.int8))
    rows: NDArray[np.int8] = getattr(state, _ROWS)
    return rows


def _may_wait() -> contextlib.AbstractContextManager[Any]:
    """Tells vLLM that a wait for the device is meant, where it looks for those that are not."""
    try:
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed
    except ImportError:
        return contextlib.nullcontext()
    allowed: contextlib.AbstractContextManager[Any] = gpu_sync_allowed()
    return allowed
