"""Seam: the offloading connector of vLLM, whose manager, eviction and tiers may be our own."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from xllm_plugins.compat import Target

WHY = "vLLM moves KV to host memory and beyond; which KV, when, and whether back, is our decision."
WITHOUT = "xllm.kv is off where kv.host_gib asks for tiers; transfer alone goes on."
HOLDS_FOR = ">=0.32,<0.33"
_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_KV = "vllm.v1.kv_offload"
SEAM = (
    Target(
        f"{_V1}.offloading_connector:OffloadingConnector.get_num_new_matched_tokens",
        ("self", "request", "num_computed_tokens"),
    ),
    Target(
        f"{_V1}.offloading_connector:OffloadingConnector.update_connector_output",
        ("self", "connector_output"),
    ),
    Target(f"{_V1}.offloading_connector:OffloadingConnector.on_new_request", ("self", "request")),
    Target(f"{_V1}.base:KVConnectorBase_V1.bind_kv_cache_manager", ("self", "kv_cache_manager")),
    Target("vllm.v1.core.block_pool:BlockPool.get_cached_block", ("self", "block_hash")),
    Target(f"{_V1}.offloading.common:OffloadingWorkerMetadata"),
    Target(f"{_KV}.tiering.spec:TieringOffloadingSpec.get_manager", ("self",)),
    Target(f"{_KV}.tiering.spec:TieringOffloadingSpec.create_worker", ("self", "kv_caches")),
    Target(f"{_KV}.tiering.manager:TieringOffloadingManager.lookup", ("key", "req_context")),
    Target(f"{_KV}.tiering.manager:TieringOffloadingManager.prepare_store", ("keys",)),
    Target(f"{_KV}.tiering.base:SecondaryTierManager.submit_load", ("self", "job_metadata")),
    Target(f"{_KV}.cpu.manager:CPUOffloadingManager._get_num_free_chunks", ("self",)),
    Target(f"{_KV}.tiering.async_lookup:AsyncLookupManager.lookup", ("key", "req_context")),
    Target(f"{_KV}.tiering.async_lookup:AsyncLookupManager.batch_lookup", ("keys",)),
    Target(f"{_KV}.tiering.async_lookup:AsyncLookupManager.mark_miss", ("keys",)),
    Target(f"{_KV}.cpu.policies.base:CachePolicy.evict", ("self", "n", "protected")),
    Target(f"{_KV}.base:make_offload_key", ("block_hash", "group_idx")),
    Target(
        f"{_KV}.cpu.shared_offload_region:SharedOffloadRegion.create_next_worker_view",
        ("self", "tensor_page_size"),
    ),
    Target("vllm.v1.core.kv_cache_utils:init_none_hash", ("hash_fn",)),
    Target(
        f"{_V1}.offloading.events:OffloadingEventsTracker._build_event_metadata",
        ("self", "req", "group_config", "chunk_idx"),
    ),
    Target(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
)


def manager_of(connector: Any) -> Any:
    """The offloading manager of a scheduler's offloading connector."""
    return connector.connector_scheduler.manager


def tell_extra_keys(connector: Any) -> None:
    """Have the events of a scheduler's tiers say what a block depends on beside its tokens.

    Those of the device say it: cache salt, LoRA adapter, images. vLLM has put it off for tiers.
    """
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    tracker = connector.connector_scheduler._events_tracker
    build = tracker._build_event_metadata

    def build_with_extra_keys(req: Any, group_config: Any, chunk_idx: int) -> Any:
        told = build(req, group_config, chunk_idx)
        begin, size = chunk_idx * group_config.tokens_per_chunk, told.block_size
        told.extra_keys = tuple(
            generate_block_hash_extra_keys(req, start, start + size, 0)[0]
            for start in range(begin, begin + group_config.tokens_per_chunk, size)
        )
        return told

    tracker._build_event_metadata = build_with_extra_keys


def policy_of(manager: Any) -> Any:
    """The cache policy of a tiering manager's host tier."""
    return manager.primary_tier._policy


def tokens_on_device(connector: Any, request: Any) -> int:
    """Leading tokens of a request that a scheduler's first KV cache group holds."""
    pool = connector._kv_cache_manager.block_pool
    held = takewhile(lambda one: pool.get_cached_block(one, [0]), request.block_hashes)
    return sum(1 for _ in held) * int(pool.hash_block_size)


def chunks_held(manager: Any) -> int:
    """How many chunks lie in a tiering manager's host tier."""
    host = manager.primary_tier
    return int(host._num_chunks - host._get_num_free_chunks())


def unname_region(spec: Any) -> None:
    """Take the name of the shared memory away once everybody has it: it then ends with them.

    Workers map it before the scheduler does. A scheduler that made it waits for them still, and
    then its name has to stay.
    """
    region = spec._scheduler_mmap
    if not region._creator:
        Path(region.mmap_path).unlink(missing_ok=True)


def moved(connector_output: Any) -> tuple[tuple[int, float], tuple[int, float]]:
    """Bytes and seconds of what workers loaded from host memory, and of what they stored there."""
    stats = connector_output.kv_connector_worker_meta.transfer_stats
    return (stats.load.bytes, stats.load.time), (stats.store.bytes, stats.store.time)


def hash_seed() -> bytes:
    """What this process's block hashes begin with: without the same seed no hash is the same."""
    from vllm.v1.core import kv_cache_utils

    return bytes(kv_cache_utils.NONE_HASH)
