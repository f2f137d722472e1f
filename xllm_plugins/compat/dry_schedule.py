"""Seam: which levers a scheduler obeys under one configuration, tried on it with one request.

vllm-ascend's schedulers choose between a body of their own and vLLM's by the configuration, which
their source does not tell. So one is built as an engine would build it, with little KV and nobody
to talk to, and has to leave a request out and to keep to a budget.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from xllm_plugins.compat import Target
from xllm_plugins.compat.scheduler_levers import Lever, hold, token_budget

WHY = "Some schedulers choose by the configuration between bodies that read other levers."
WITHOUT = "xllm.scheduler is off."
HOLDS_FOR = ">=0.23,<0.33"
_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector"
SEAM = (
    Target(
        "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        ("vllm_config", "kv_cache_config", "structured_output_manager", "block_size"),
    ),
    Target("vllm.v1.core.sched.scheduler:Scheduler.shutdown", ("self",)),
    Target("vllm.v1.kv_cache_interface:KVCacheConfig"),
    Target("vllm.v1.kv_cache_interface:KVCacheGroupSpec"),
    Target("vllm.v1.kv_cache_interface:FullAttentionSpec"),
    Target(
        "vllm.v1.request:Request.__init__",
        ("request_id", "prompt_token_ids", "sampling_params", "pooling_params"),
    ),
    Target("vllm.v1.request:Request.append_output_token_ids"),
    Target(f"{_CONNECTORS}:MultiConnector"),
)
_PROMPT = 4  # tokens, all of which fit into a step
_BLOCKS = 8


def obeyed_levers(base: type, vllm_config: Any) -> frozenset[Lever]:
    """The levers for holding and for the budget that ``base`` obeys under ``vllm_config``."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    scheduler = _scheduler(base, vllm_config)
    try:
        request = Request("xllm-dry", [0] * _PROMPT, SamplingParams(max_tokens=_PROMPT), None)
        scheduler.add_request(request)
        with token_budget(scheduler, 1):
            first = _step(scheduler)
        rest = _step(scheduler)
        request.append_output_token_ids(0)
        hold(scheduler, request)
        held, freed = _step(scheduler), _step(scheduler)
    finally:
        scheduler.shutdown()
    obeyed = {Lever.BUDGET: first <= 1 and first + rest == _PROMPT, Lever.HOLD: freed and not held}
    return frozenset(lever for lever, does in obeyed.items() if does)


def _step(scheduler: Any) -> int:
    return int(scheduler.schedule().total_num_scheduled_tokens)


def _scheduler(base: type, vllm_config: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    config = copy.copy(vllm_config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.num_gpu_blocks = _BLOCKS
    config.cache_config.enable_prefix_caching = False
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.decode_context_parallel_size = 1
    config.parallel_config.prefill_context_parallel_size = 1
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.disable_hybrid_kv_cache_manager = True  # there is one kind of layers
    config.kv_events_config = config.ec_transfer_config = config.speculative_config = None
    if config.kv_transfer_config is not None:
        # The role stays, which schedulers look at; the connector would open ports.
        config.kv_transfer_config = copy.copy(config.kv_transfer_config)
        config.kv_transfer_config.kv_connector = "MultiConnector"
        config.kv_transfer_config.kv_connector_module_path = _CONNECTORS
        config.kv_transfer_config.kv_connector_extra_config = {"connectors": []}
    tokens = config.cache_config.block_size
    spec = FullAttentionSpec(block_size=tokens, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return base(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=_BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=None,
        block_size=tokens,
        mm_registry=SimpleNamespace(supports_multimodal_inputs=lambda model_config: False),
    )
