"""vLLM's own tiers on a CPU, to compare with: its manager and its LRU, and a worker that copies.

vLLM's worker wants CUDA's streams. All that decides is vLLM's; the copies are those of our tiers.
"""

from __future__ import annotations

import json

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from xllm_kv.tiers.worker import HostCopies


class VllmTiers(TieringOffloadingSpec):  # type: ignore[misc]
    """See the module."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """See vLLM's class."""
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return HostCopies(kv_caches, region, self.blocks_per_chunk)


def transfer_config(host_bytes: int) -> str:
    """What ``--kv-transfer-config`` is for a server that has this module on its path."""
    extra = {
        "spec_name": VllmTiers.__name__,
        "spec_module_path": __name__,
        "cpu_bytes_to_use": host_bytes,
        "eviction_policy": "lru",
        "self_describing_kv_events": True,
    }
    config = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return json.dumps(config)
