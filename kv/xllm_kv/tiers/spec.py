"""vLLM's tiering, with our manager before it and, where the device is the CPU, our copies."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from xllm_kv.config import Admission, Stop
from xllm_kv.prices import Prices
from xllm_kv.tiers.cache_policy import ReuseCachePolicy
from xllm_kv.tiers.manager import HOST, GatedManager
from xllm_kv.tiers.worker import HostCopies
from xllm_plugins.compat import kv_tiers

_GUESSES = {  # latency in ms, MiB per ms
    HOST: (0.1, 5.0),
    "DiskTier": (1.0, 0.5),
    "RemoteTier": (1.0, 0.2),
}
_GUESS = (5.0, 0.2)  # of a tier that is not ours


class TiersSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """Host memory and what is configured behind it."""

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        tiers = [tier["type"] for tier in self.secondary_tier_configs]
        self.prices = Prices({name: _GUESSES.get(name, _GUESS) for name in (HOST, *tiers)})
        self._gated: GatedManager | None = None
        self._copies: HostCopies | None = None

    def get_manager(self) -> GatedManager:
        """The manager of vLLM, behind our decisions."""
        if self._gated is None:
            inner = super().get_manager()
            kv_tiers.unname_region(self)
            policy = kv_tiers.policy_of(inner)
            settings: dict[str, Any] = self.extra_config["xllm"]
            reuse = policy.reuse if isinstance(policy, ReuseCachePolicy) else None
            if reuse is not None:
                reuse.tenant_share = settings["tenant_share"]
                reuse.pin_share = settings["pin_share"]
            self._gated = GatedManager(
                inner,
                reuse,
                self.prices,
                priced=settings["price"],
                stop=Stop(settings["stop"]),
                admission=Admission(settings["admission"]),
                capacity=self.num_chunks,
                chunk_bytes=self.kv_bytes_per_chunk,
            )
        return self._gated

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of vLLM, or ours on a platform that it refuses."""
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._copies is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._copies = HostCopies(kv_caches, region, self.blocks_per_chunk)
        return self._copies
