"""vLLM's own publisher on real sockets, read by the router's feed into the index."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from benchmarks.lab.server import free_port
from xllm_kv.index import Prompt
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.kv_feed import KvFeed
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.staged import round_robin

SIZE = 4
TOKENS = list(range(16))


class Engine:
    """An engine's publisher."""

    def __init__(self, port: int, replay_port: int, buffer_steps: int = 100) -> None:
        self.record = Record(
            "a", "http://a", ("m",), block_tokens=SIZE,
            kv_events=(f"tcp://127.0.0.1:{port}",), kv_replay=(f"tcp://127.0.0.1:{replay_port}",),
        )  # fmt: skip
        self._publisher = ZmqEventPublisher(
            0, f"tcp://*:{port}", f"tcp://*:{replay_port}", buffer_steps=buffer_steps
        )

    def stores(self, blocks: int, start: int = 0) -> None:
        """Publish blocks ``start`` to ``blocks`` of the prompt, in a batch."""
        hashes = list(range(start, blocks))
        tokens = TOKENS[start * SIZE : blocks * SIZE]
        parent = start - 1 if start else None
        event = BlockStored(
            block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=SIZE,
            lora_id=None, medium="GPU", lora_name=None, extra_keys=None, group_idx=0,
        )  # fmt: skip
        self._publisher.publish(KVEventBatch(ts=time.time(), events=[event]))

    def removes(self, block: int) -> None:
        event = BlockRemoved(block_hashes=[block], medium="GPU", group_idx=0)
        self._publisher.publish(KVEventBatch(ts=time.time(), events=[event]))

    def ends(self) -> None:
        self._publisher.shutdown()


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


@pytest.fixture
async def feed() -> AsyncIterator[tuple[Fleet, KvFeed]]:
    fleet = Fleet(round_robin())
    made = KvFeed(fleet, time.monotonic)
    yield fleet, made
    await made.close()


def held(fleet: Fleet) -> int:
    matches = fleet.index.match(Prompt("m", TOKENS))
    return matches["a#0"].total if matches else 0


async def until(fleet: Fleet, tokens: int) -> None:
    async def wait() -> None:
        while held(fleet) != tokens:
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), 20)


async def test_events_reach_the_index(engines: Any, feed: tuple[Fleet, KvFeed]) -> None:
    fleet, follows = feed
    engine = engines()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await asyncio.sleep(0.5)
    engine.stores(3)
    await until(fleet, 12)
    engine.stores(4, start=3)
    await until(fleet, 16)
    engine.removes(1)
    await until(fleet, 4)


async def test_who_joins_late_is_told_what_was_before(
    engines: Any, feed: tuple[Fleet, KvFeed]
) -> None:
    fleet, follows = feed
    engine = engines()
    engine.stores(2)
    engine.stores(4, start=2)
    await asyncio.sleep(0.5)
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await until(fleet, 16)


async def test_what_the_publisher_no_longer_has_is_not_claimed(
    engines: Any, feed: tuple[Fleet, KvFeed]
) -> None:
    fleet, follows = feed
    engine = engines(buffer_steps=2)
    for block in range(4):
        engine.stores(block + 1, start=block)
    await asyncio.sleep(0.5)
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await asyncio.sleep(1.0)
    assert held(fleet) == 0
    assert fleet.index.counts.unknown_parents == 2
    engine.stores(4)  # as vLLM tells of blocks that it uses again
    await until(fleet, 16)


async def test_an_engine_that_starts_anew_begins_empty(
    engines: Any, feed: tuple[Fleet, KvFeed]
) -> None:
    fleet, follows = feed
    engine = engines()
    fleet.join(engine.record, 0.0)
    follows.follow(engine.record)
    await asyncio.sleep(0.5)
    engine.stores(3)
    engine.stores(4, start=3)
    await until(fleet, 16)
    engine.ends()
    again = engines()
    await asyncio.sleep(1.0)  # the socket connects again by itself
    again.stores(1)
    await until(fleet, 4)
