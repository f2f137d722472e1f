"""A disk as a tier: one file for each chunk, believed only if its checksum is right."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from xllm_kv.prices import Prices
from xllm_kv.tiers.block_file import BlockFileError, read_block, write_block
from xllm_plugins.compat import kv_tiers

_READERS = 2
logger = logging.getLogger("vllm.xllm_kv")


class DiskTier(SecondaryTierManager):  # type: ignore[misc]
    """Keeps chunks in files under a folder of its model, dtype, layout and hash seed.

    Args:
        folder: of all models' chunks; made where it is missing, for this user alone.
        capacity: bytes that the files of this model may take.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        folder: str,
        capacity: int,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._memory = primary_kv_view.cast("B")
        self._prices: Prices = offloading_spec.prices
        self._root, self._folder, self._identity = Path(folder), Path(folder), b""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._most = max(1, capacity // self.block_size_bytes)
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        self._being_written: set[bytes] = set()
        self._readers = ThreadPoolExecutor(_READERS, "xllm-kv-read")
        self._writer = ThreadPoolExecutor(1, "xllm-kv-write")
        self._jobs: dict[Future[list[OffloadKey]], tuple[TransferJob, float]] = {}
        wants_events = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if wants_events else None
        self._complained = False

    @property
    def loading_bytes(self) -> int:
        """Of fetches that are under way."""
        chunks = sum(len(job.keys) for job, _ in self._jobs.values() if job.is_promotion)
        return chunks * int(self.block_size_bytes)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See vLLM's class."""
        return LookupResult.HIT if bytes(key) in self._kept else LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """See vLLM's class; the first of a prompt is given up last."""
        for key in reversed(list(keys)):
            if bytes(key) in self._kept:
                self._kept.move_to_end(bytes(key))

    def submit_store(self, job_metadata: TransferJob) -> None:
        """See vLLM's class."""
        new = {bytes(key) for key in job_metadata.keys} - self._kept.keys() - self._being_written
        self._being_written |= new
        self._submit(self._writer, job_metadata, self._write, job_metadata, new)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """See vLLM's class."""
        self._prices.began(self.tier_type, len(job_metadata.keys) * self.block_size_bytes)
        self._submit(self._readers, job_metadata, self._read, job_metadata)

    def _submit(self, pool: ThreadPoolExecutor, job: TransferJob, *call: Any) -> None:
        self._jobs[pool.submit(*call)] = (job, time.monotonic())

    def _write(self, job: TransferJob, new: Collection[bytes]) -> list[OffloadKey]:
        """Runs in a thread; the keys that were written."""
        written = []
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            if bytes(key) not in new:
                continue
            try:
                write_block(self._path(key), self._identity + key, self._chunk(chunk))
            except OSError as error:
                self._complain(error)
                break
            written.append(key)
        return written

    def _read(self, job: TransferJob) -> list[OffloadKey]:
        """Runs in a thread; the keys that were read."""
        read = []
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            try:
                read_block(self._path(key), self._identity + key, self._chunk(chunk))
            except (OSError, BlockFileError) as error:
                self._complain(error)
                break
            read.append(key)
        return read

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("KV on disk: %s; it is computed instead (told once)", error)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """See vLLM's class."""
        for future in [future for future in self._jobs if future.done()]:
            job, began_s = self._jobs.pop(future)
            took_s = time.monotonic() - began_s
            done = future.result()
            if job.is_promotion:
                yield self._read_ended(job, done, took_s)
            else:
                yield self._write_ended(job, done, took_s)

    def _read_ended(self, job: TransferJob, done: list[OffloadKey], took_s: float) -> JobResult:
        size, ok = self.block_size_bytes, len(done) == len(job.keys)
        self._prices.ended(self.tier_type, len(job.keys) * size, took_s, ok=ok)
        for key in [key for key in job.keys if key not in set(done)][:1]:
            self._give_up(bytes(key))
        return JobResult(job.job_id, ok, tuple(done), took_s, len(done) * size)

    def _write_ended(self, job: TransferJob, done: list[OffloadKey], took_s: float) -> JobResult:
        counts = self._prices.counts[self.tier_type]
        self._prices.stored(self.tier_type, len(done) * self.block_size_bytes, took_s)
        known = [key for key in job.keys if bytes(key) in self._kept]
        counts.errors += len(done) + len(known) < len(job.keys)
        self._being_written -= {bytes(key) for key in job.keys}
        self._kept |= dict.fromkeys(bytes(key) for key in done)
        self._tell(done, removed=False)
        self._give_up_the_rest()
        return JobResult(job.job_id, True, None, took_s, len(done) * self.block_size_bytes)

    def _give_up_the_rest(self) -> None:
        while len(self._kept) > self._most:
            self._prices.counts[self.tier_type].evicted += 1
            self._give_up(next(iter(self._kept)))

    def _give_up(self, key: bytes) -> None:
        self._kept.pop(key, None)
        self._path(key).unlink(missing_ok=True)
        self._tell([OffloadKey(key)], removed=True)

    def _tell(self, keys: list[OffloadKey], *, removed: bool) -> None:
        if self._events is not None and keys:
            self._events.append(OffloadingEvent(keys, self.medium, removed))

    def take_events(self) -> Iterable[OffloadingEvent]:
        """See vLLM's class."""
        if self._events:
            events, self._events = self._events, []
            yield from events

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """See vLLM's class."""
        if not self._identity:
            self._open()
        return RequestOffloadingContext()

    def _open(self) -> None:
        """Find what is there; not before the first request, since the hash seed comes late."""
        self._identity = identity(self._offloading_spec)
        self._folder = self._root / self._identity.hex()[:32]
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._kept = OrderedDict.fromkeys(_found(self._folder))
        self._tell([OffloadKey(key) for key in self._kept], removed=False)
        self._give_up_the_rest()

    def drain_jobs(self) -> None:
        """See vLLM's class."""
        wait(list(self._jobs))

    def shutdown(self) -> None:
        """See vLLM's class."""
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        self._memory.release()

    def _chunk(self, number: int) -> memoryview:
        """One chunk of host memory."""
        begin = int(number) * self.block_size_bytes
        return self._memory[begin : begin + self.block_size_bytes]

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / name


def identity(spec: Any) -> bytes:
    """What two engines must have alike for one to use the other's KV, as a digest of 32 bytes."""
    import torch
    from vllm.platforms import current_platform

    config = spec.config
    parts = (
        config.model, config.cache, config.kv_cache_layout, config.groups, config.parallel,
        config.worker_kv_bytes_per_block, _files(Path(config.model.name)), kv_tiers.hash_seed(),
        # Kernels for CPUs order a block's bytes by what the CPU can do.
        torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else "",
        zlib.__name__,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).digest()


def _files(model: Path) -> list[tuple[str, int, int]]:
    """A local model's files: other weights under the same name are another model."""
    if not model.is_dir():
        return []
    found = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _found(folder: Path) -> list[bytes]:
    """The chunks that an earlier process left, the oldest first; what it had not finished goes."""
    found = []
    for directory in [path for path in folder.iterdir() if path.is_dir()]:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    found.append((entry.stat().st_mtime_ns, bytes.fromhex(entry.name)))
                except ValueError:
                    Path(entry.path).unlink(missing_ok=True)
    return [key for _, key in sorted(found)]
