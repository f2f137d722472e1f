"""Copies between the device's KV cache and host memory where the device is the CPU.

vLLM's own worker copies with CUDA's streams and refuses this platform. Here a copy is one pass over
memory by the thread that computes, between steps: nothing would be gained by another thread, which
would take the same cores.
"""

from __future__ import annotations

import time

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class HostCopies(OffloadingWorker):  # type: ignore[misc]
    """Copies whole blocks: their layout inside is the attention kernel's own.

    Args:
        kv_caches: the device's tensors, each of shape ``[blocks, bytes]``.
        region: host memory, shared with the scheduler's process.
        blocks_per_chunk: device blocks that lie together in one chunk of host memory.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int
    ) -> None:
        self._region, self._blocks_per_chunk = region, blocks_per_chunk
        self._finished: list[TransferResult] = []
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for cache in kv_caches.tensors:
            host = region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk)
            self._pairs.append((cache.tensor, host))

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Copy to host memory."""
        return self._copied(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy from host memory."""
        return self._copied(job_id, dst_spec, src_spec, to_host=False)

    def _copied(
        self, job_id: int, on_device: GPULoadStoreSpec, in_host: LoadStoreSpec, *, to_host: bool
    ) -> bool:
        began_s = time.perf_counter()
        places = self._places(on_device, in_host)
        moved = 0
        for device, host in self._pairs:
            size = device.shape[1]
            for block, chunk, part in places:
                kept = host[chunk, part * size : (part + 1) * size]
                if to_host:
                    kept.copy_(device[block])
                else:
                    device[block].copy_(kept)
            moved += size * len(places)
        took_s = time.perf_counter() - began_s
        self._finished.append(TransferResult(job_id, True, moved, took_s))
        return True

    def _places(
        self, on_device: GPULoadStoreSpec, in_host: LoadStoreSpec
    ) -> list[tuple[int, int, int]]:
        """Device block, chunk and place in the chunk, for each block to copy."""
        assert isinstance(in_host, CPULoadStoreSpec)
        chunks = [int(chunk) for chunk in in_host.chunk_ids]
        blocks = [int(b) for b in on_device.block_ids]
        places: list[tuple[int, int, int]] = []
        begin = chunk_at = 0
        for size, first in zip(on_device.group_sizes, on_device.block_indices, strict=True):
            if not size:
                continue
            part = first % self._blocks_per_chunk
            for offset in range(size):
                at = chunk_at + (part + offset) // self._blocks_per_chunk
                place = (part + offset) % self._blocks_per_chunk
                places.append((blocks[begin + offset], chunks[at], place))
            chunk_at += -(-(part + size) // self._blocks_per_chunk)
            begin += size
        return places

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is done when it has been submitted."""

    def shutdown(self) -> None:
        """Let go of host memory."""
        self._pairs.clear()
        self._region.cleanup()
