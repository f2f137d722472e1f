"""What every tier behind host memory does alike: jobs in threads, their prices, and events."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar, NamedTuple

from vllm.v1.kv_offload.base import (
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from xllm_kv.prices import Prices
from xllm_kv.report import Room
from xllm_kv.tiers.block_format import BlockError
from xllm_kv.tiers.identity import identity

_READERS = 2
_LOADS, _STORES = True, False
_IN_FLIGHT = {_LOADS: 0.5, _STORES: 0.75}  # of host memory, beyond which no more is begun
logger = logging.getLogger("vllm.xllm_kv")


class _Done(NamedTuple):
    keys: list[OffloadKey]
    error: Exception | None = None


class StoreTier(SecondaryTierManager):  # type: ignore[misc]
    """Moves chunks between host memory and a store, each under its engine's identity.

    vLLM calls it from the scheduler's thread; ``_put`` and ``_get`` run in others.

    Attributes:
        name: what people are told.
        failures: what the store raises where it cannot do its work.
    """

    medium: ClassVar[Medium] = Medium.STORAGE
    name: ClassVar[str]
    failures: ClassVar[tuple[type[Exception], ...]]

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._memory = primary_kv_view.cast("B")
        size = self._memory.nbytes
        self._most_under_way = {way: int(size * share) for way, share in _IN_FLIGHT.items()}
        self._prices: Prices = offloading_spec.prices
        self._identity = b""
        self._readers = ThreadPoolExecutor(_READERS, "xllm-kv-read")
        self._writer = ThreadPoolExecutor(1, "xllm-kv-write")
        self._jobs: dict[Future[tuple[_Done, float]], TransferJob] = {}
        self._under_way = {_LOADS: 0, _STORES: 0}  # bytes
        self._skipped: list[TransferJob] = []
        self._probing: Future[float | None] | None = None
        wants_events = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if wants_events else None
        self._complained = False

    @abstractmethod
    def _open(self) -> None:
        """Begin, now that the identity is known."""

    @abstractmethod
    def _lacking(self, keys: Collection[OffloadKey]) -> set[OffloadKey]:
        """Which of these to write; runs in the writing thread."""

    @abstractmethod
    def _put(self, key: OffloadKey, content: memoryview) -> None:
        """Write a chunk; runs in the writing thread."""

    @abstractmethod
    def _get(self, key: OffloadKey, into: memoryview) -> None:
        """Read a chunk, or raise BlockError or a failure; runs in a reading thread."""

    @abstractmethod
    def _stored(self, keys: Collection[OffloadKey]) -> None:
        """Note what has been written."""

    @abstractmethod
    def _unread(self, keys: Collection[OffloadKey], error: Exception | None) -> None:
        """Note what could not be read, of which the first one failed."""

    @property
    @abstractmethod
    def room(self) -> Room:
        """How large it is, and how full."""

    @property
    def busy(self) -> bool:
        """Whether somebody may be waiting for it."""
        return self._under_way[_LOADS] > 0

    def _accepts(self, *, promotions: bool) -> bool:
        return self._under_way[promotions] < self._most_under_way[promotions]

    def submit_store(self, job_metadata: TransferJob) -> None:
        """See vLLM's class; what comes faster than it can be written is not kept here."""
        if self._accepts(promotions=False):
            self._submit(self._writer, job_metadata, self._write)
        else:
            self._skipped.append(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """See vLLM's class."""
        self._prices.began(self.tier_type, len(job_metadata.keys) * self.block_size_bytes)
        self._submit(self._readers, job_metadata, self._read)

    def probe(self, key: OffloadKey) -> None:
        """Read a chunk with nobody waiting, to see how long it takes; loads tell that as well."""
        if self._probing is None and not self._under_way[_LOADS]:
            self._prices.counts[self.tier_type].probes += 1
            self._probing = self._readers.submit(self._read_for_nobody, key)

    def _read_for_nobody(self, key: OffloadKey) -> float | None:
        """Runs in a thread; how long it took, s, or None if the chunk could not be read."""
        began_s = time.monotonic()
        try:
            self._get(key, memoryview(bytearray(self.block_size_bytes)))
        except BlockError:
            return None
        except self.failures as error:
            self._failed(error)
            return None
        return time.monotonic() - began_s

    def _submit(self, pool: ThreadPoolExecutor, job: TransferJob, call: Any) -> None:
        self._under_way[job.is_promotion] += len(job.keys) * self.block_size_bytes
        began_s = time.monotonic()

        def run() -> tuple[_Done, float]:
            return call(job), time.monotonic() - began_s  # the engine may ask a long step later

        self._jobs[pool.submit(run)] = job

    def _write(self, job: TransferJob) -> _Done:
        """Runs in a thread; the keys that were written."""
        written: list[OffloadKey] = []
        try:
            lacking = self._lacking(job.keys)
            for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
                if key in lacking:
                    self._put(key, self._chunk(chunk))
                    written.append(key)
        except self.failures as error:
            return _Done(written, error)
        return _Done(written)

    def _read(self, job: TransferJob) -> _Done:
        """Runs in a thread; the keys that were read."""
        read: list[OffloadKey] = []
        failures: tuple[type[Exception], ...] = (BlockError, *self.failures)
        try:
            for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
                self._get(key, self._chunk(chunk))
                read.append(key)
        except failures as error:
            return _Done(read, error)
        return _Done(read)

    def _failed(self, error: Exception) -> None:
        """Say once that the store failed, in whatever thread."""
        if not self._complained:
            self._complained = True
            logger.warning("KV %s: %s; it is computed instead (told once)", self.name, error)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """See vLLM's class."""
        if self._probing is not None and self._probing.done():
            took_s, self._probing = self._probing.result(), None
            if took_s is not None:
                self._prices.learn(self.tier_type, self.block_size_bytes, took_s)
        skipped, self._skipped = self._skipped, []
        for job in skipped:
            self._prices.counts[self.tier_type].skipped += len(job.keys)
            yield JobResult(job.job_id, False, None, 0.0, 0)
        for future in [future for future in self._jobs if future.done()]:
            job = self._jobs.pop(future)
            self._under_way[job.is_promotion] -= len(job.keys) * self.block_size_bytes
            done, took_s = future.result()
            if done.error is not None:
                self._failed(done.error)
            if job.is_promotion:
                yield self._read_ended(job, done, took_s)
            else:
                yield self._write_ended(job, done, took_s)

    def _read_ended(self, job: TransferJob, done: _Done, took_s: float) -> JobResult:
        size, ok = self.block_size_bytes, done.error is None
        self._prices.ended(self.tier_type, len(job.keys) * size, took_s, ok=ok)
        if not ok:
            self._unread(list(job.keys)[len(done.keys) :], done.error)
        return JobResult(job.job_id, ok, tuple(done.keys), took_s, len(done.keys) * size)

    def _write_ended(self, job: TransferJob, done: _Done, took_s: float) -> JobResult:
        moved = len(done.keys) * self.block_size_bytes
        self._prices.stored(self.tier_type, moved, took_s)
        self._prices.counts[self.tier_type].errors += done.error is not None
        self._stored(done.keys)
        return JobResult(job.job_id, True, None, took_s, moved)

    def _tell(self, keys: Collection[OffloadKey], *, removed: bool) -> None:
        if self._events is not None and keys:
            event = OffloadingEvent(list(keys), self.medium, removed, self.locality)
            self._events.append(event)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """See vLLM's class."""
        if self._events:
            events, self._events = self._events, []
            yield from events

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """See vLLM's class."""
        if not self._identity:
            self._identity = identity(self._offloading_spec)
            self._open()
        return RequestOffloadingContext()

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
