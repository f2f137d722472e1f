"""vLLM's own publisher on real sockets, read by the router's feed into the index."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from benchmarks.lab.server import free_port
from xllm_kv.index import Prompt
from xllm_kv.ledger import Ledger
from xllm_kv.snapshot import Snapshot
from xllm_scheduler.service import kv_feed
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.kv_feed import KvFeed
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.staged import round_robin

WAIT_S = 60.0  # for what takes a moment, on however busy a machine
SIZE = 4
TOKENS = list(range(16))


class Publisher(ZmqEventPublisher):  # type: ignore[misc]
    """vLLM's, which tells when it is followed, and loses batches while it is told to.

    The numbers of these are used up, and nobody gets them.
    """

    loses = False

    def _socket_setup(self) -> None:
        self._pub = self._ctx.socket(zmq.XPUB)  # PUB that also tells of subscriptions
        self._pub.bind(self._endpoint)
        super()._socket_setup()

    async def idles(self) -> None:
        """Until all has been published; its thread then leaves its socket alone."""
        while self._event_queue.unfinished_tasks:
            await asyncio.sleep(0.01)

    async def is_followed(self) -> None:
        """Until somebody has subscribed, who from then on misses nothing."""
        await self.idles()
        while not self._pub.poll(0):
            await asyncio.sleep(0.01)
        assert self._pub.recv().startswith(b"\x01")

    def publish(self, events: KVEventBatch) -> None:
        if self.loses:
            next(self._seq_gen)
        else:
            super().publish(events)


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZMQ binds
        try:
            tried.bind(("", port))
        except OSError:
            return False
        return True


class Engine:
    """An engine's publisher."""

    def __init__(self, port: int, replay_port: int, buffer_steps: int = 100) -> None:
        self.record = Record(
            "a", "http://a", ("m",), block_tokens=SIZE,
            kv_events=(f"tcp://127.0.0.1:{port}",), kv_replay=(f"tcp://127.0.0.1:{replay_port}",),
        )  # fmt: skip
        self.publisher = Publisher(
            0, f"tcp://*:{port}", f"tcp://*:{replay_port}", buffer_steps=buffer_steps
        )
        self._ledger = Ledger(self.publisher, "m", SIZE, (0,))
        self._ended = False

    def stores(self, blocks: int, start: int = 0) -> None:
        """Publish blocks ``start`` to ``blocks`` of the prompt, in a batch."""
        hashes = list(range(start, blocks))
        tokens = TOKENS[start * SIZE : blocks * SIZE]
        parent = start - 1 if start else None
        event = BlockStored(
            block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=SIZE,
            lora_id=None, medium="GPU", lora_name=None, extra_keys=None, group_idx=0,
        )  # fmt: skip
        self._ledger.publish(KVEventBatch(ts=time.time(), events=[event]))

    def removes(self, block: int) -> None:
        event = BlockRemoved(block_hashes=[block], medium="GPU", group_idx=0)
        self._ledger.publish(KVEventBatch(ts=time.time(), events=[event]))

    def snapshot(self) -> Snapshot:
        taken = self._ledger.snapshot()
        assert taken is not None
        return Snapshot.read(taken)

    def ends(self) -> None:
        """Stop publishing, and wait until ZMQ's own thread has given the addresses back."""
        if self._ended:  # another one may have its addresses now
            return
        self._ended = True
        self._ledger.shutdown()
        until_s = time.monotonic() + WAIT_S
        for address in (*self.record.kv_events, *self.record.kv_replay):
            while not _is_free(int(address.rpartition(":")[2])):
                assert time.monotonic() < until_s, f"{address} is never given back"
                time.sleep(0.01)


@pytest.fixture
async def engines() -> AsyncIterator[Callable[..., Engine]]:
    made: list[Engine] = []
    ports = free_port(), free_port()

    def start(**more: Any) -> Engine:
        made.append(Engine(*ports, **more))
        return made[-1]

    yield start
    for engine in made:
        engine.ends()


@dataclass
class Asked:
    """Answers who asks for snapshots, with what ``engine`` holds once ``passes`` is set."""

    engine: Engine | None = None
    passes: asyncio.Event = field(default_factory=asyncio.Event)
    times: int = 0

    async def __call__(self, record: Record, rank: int) -> Snapshot | None:
        self.times += 1
        taken = self.engine.snapshot() if self.engine is not None else None
        await self.passes.wait()
        return taken


@pytest.fixture
def asked() -> Asked:
    made = Asked()
    made.passes.set()
    return made


@pytest.fixture
async def feed(asked: Asked) -> AsyncIterator[tuple[Fleet, KvFeed]]:
    fleet = Fleet(round_robin())
    made = KvFeed(fleet, time.monotonic, asked)
    yield fleet, made
    await made.close()


def held(fleet: Fleet, model: str = "m") -> int:
    matches = fleet.index.match(Prompt(model, TOKENS))
    return matches["a#0"].total if matches else 0


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), WAIT_S)


async def until_held(fleet: Fleet, tokens: int) -> None:
    await until(lambda: held(fleet) == tokens)


async def test_events_reach_the_index(engines: Any, feed: tuple[Fleet, KvFeed]) -> None:
    fleet, follows = feed
    engine = engines()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await engine.publisher.is_followed()
    engine.stores(3)
    await until_held(fleet, 12)
    engine.stores(4, start=3)
    await until_held(fleet, 16)
    engine.removes(1)
    await until_held(fleet, 4)


async def test_who_joins_late_is_told_what_was_before(
    engines: Any, feed: tuple[Fleet, KvFeed]
) -> None:
    fleet, follows = feed
    engine = engines()
    engine.stores(2)
    engine.stores(4, start=2)
    await engine.publisher.idles()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await until_held(fleet, 16)


async def test_what_the_publisher_no_longer_has_is_not_claimed(
    engines: Any, feed: tuple[Fleet, KvFeed]
) -> None:
    fleet, follows = feed
    engine = engines(buffer_steps=2)
    for block in range(4):
        engine.stores(block + 1, start=block)
    await engine.publisher.idles()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await engine.publisher.is_followed()
    await until(lambda: fleet.index.counts.unknown_parents == 2)
    assert held(fleet) == 0
    engine.stores(4)  # as vLLM tells of blocks that it uses again
    await until_held(fleet, 16)


async def test_an_engine_that_starts_anew_begins_empty(
    engines: Any, feed: tuple[Fleet, KvFeed]
) -> None:
    fleet, follows = feed
    engine = engines()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await engine.publisher.is_followed()
    engine.stores(3)
    engine.stores(4, start=3)
    await until_held(fleet, 16)
    engine.ends()
    again = engines()
    await again.publisher.is_followed()  # the socket connects again by itself
    again.stores(1)
    await until_held(fleet, 4)


async def test_who_joins_late_is_told_by_a_snapshot_what_the_publisher_no_longer_has(
    engines: Any, feed: tuple[Fleet, KvFeed], asked: Asked
) -> None:
    fleet, follows = feed
    asked.engine = engine = engines(buffer_steps=1)
    for block in range(3):
        engine.stores(block + 1, start=block)
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await until_held(fleet, 12)
    await engine.publisher.is_followed()
    engine.stores(4, start=3)  # whose parent is known from the snapshot alone
    await until_held(fleet, 16)
    assert fleet.index.counts.unknown_parents == 0
    assert asked.times == 1


async def test_events_while_a_snapshot_is_taken_are_neither_missed_nor_applied_twice(
    engines: Any, feed: tuple[Fleet, KvFeed], asked: Asked
) -> None:
    fleet, follows = feed
    asked.engine = engine = engines()
    engine.stores(2)
    asked.passes.clear()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await engine.publisher.is_followed()
    assert held(fleet) == 0
    engine.removes(1)  # which the snapshot still has
    engine.stores(3)
    engine.stores(4, start=3)
    asked.passes.set()
    await until_held(fleet, 16)
    assert fleet.index.counts.removed == 1
    assert fleet.index.counts.unknown_removals == 0
    assert len(fleet.index) == 4


async def test_what_is_lost_under_way_is_made_good_by_a_snapshot(
    engines: Any, feed: tuple[Fleet, KvFeed], asked: Asked
) -> None:
    fleet, follows = feed
    asked.engine = engine = engines(buffer_steps=1)
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await engine.publisher.is_followed()
    engine.stores(1)
    await until_held(fleet, 4)
    engine.publisher.loses = True
    engine.stores(3, start=1)
    engine.publisher.loses = False
    engine.stores(4, start=3)
    await until_held(fleet, 16)
    assert asked.times == 2


async def test_unknown_parents_are_asked_for_and_not_guessed(
    engines: Any, feed: tuple[Fleet, KvFeed], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_feed, "_AGAIN_S", 0.0)
    fleet, follows = feed
    engine = engines(buffer_steps=1)
    for block in range(3):
        engine.stores(block + 1, start=block)
    await engine.publisher.idles()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)  # of an instance that gives no snapshot yet
    await engine.publisher.is_followed()
    await until(lambda: fleet.index.counts.unknown_parents == 1)
    assert held(fleet) == 0
    asked.engine = engine
    engine.stores(4, start=3)
    await until_held(fleet, 16)


async def test_a_snapshot_of_other_kv_is_not_used(
    engines: Any, feed: tuple[Fleet, KvFeed], asked: Asked
) -> None:
    fleet, follows = feed
    asked.engine = engine = engines()
    engine.stores(4)
    record = dataclasses.replace(engine.record, models=("another",))
    fleet.join(record, 0.0)
    follows.follow(record)
    await until(lambda: held(fleet, "another") == 16)  # from its events
    assert asked.times == 1
    assert held(fleet) == 0
