"""Reads instances' KV events from their ZMQ publishers into the fleet's index.

It begins with a snapshot of what an instance holds, and asks for one again where events are lost
for good or their parents are not known. An instance that gives none is asked for the events that
it still has.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable

import zmq
import zmq.asyncio

from xllm_kv.events import END_OF_REPLAY, Ready, Sequencer, decoded
from xllm_kv.snapshot import Held, Snapshot
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.waiting import done_within, kept_up

_REPLAY_S = 10.0  # for a publisher to send what it still has
_AGAIN_S = 5.0  # between two requests for all because of unknown parents
_SLICE = 1_000  # blocks, 3 ms of the thread that relays answers
Ask = Callable[[Record, int], Awaitable[Snapshot | None]]
"""What a rank of an instance holds; None if it does not say."""
logger = logging.getLogger("xllm.router")


class KvFeed:
    """Follows each publisher of each instance with a task of its own.

    Args:
        fleet: gets the events.
        clock: seconds.
        ask: for snapshots.
    """

    def __init__(self, fleet: Fleet, clock: Callable[[], float], ask: Ask) -> None:
        self._fleet, self._clock, self._ask = fleet, clock, ask
        self._context = zmq.asyncio.Context()
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    def follow(self, record: Record) -> None:
        """Begin with an instance, anew if it was followed."""
        self.leave(record.name)
        self._tasks[record.name] = [
            asyncio.create_task(
                kept_up(
                    f"following the KV of {record.name}",
                    functools.partial(self._followed, record, rank),
                )
            )
            for rank in range(len(record.kv_events))
        ]

    def leave(self, name: str) -> None:
        """End with an instance."""
        for task in self._tasks.pop(name, ()):
            task.cancel()

    async def close(self) -> None:
        """End with all."""
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for name in list(self._tasks):
            self.leave(name)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _followed(self, record: Record, rank: int) -> None:
        subscriber = self._context.socket(zmq.SUB)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(record.kv_events[rank])
        follower = _Follower(self._fleet, record, rank)
        try:
            await self._catch_up(follower)  # on what was published before we came
            asked_s = self._clock()
            while True:
                frames = await subscriber.recv_multipart()
                ready = follower.received(frames, live=True)
                if ready.replay_from is not None:
                    if not await self._replay(follower, ready.replay_from):
                        await self._resume(follower)
                elif follower.lacks and self._clock() - asked_s > _AGAIN_S:
                    asked_s = self._clock()
                    await self._catch_up(follower)
        finally:
            subscriber.close(linger=0)

    async def _catch_up(self, follower: _Follower) -> None:
        """Begin with all that there is."""
        if not await self._resume(follower):
            follower.anew()
            await self._replay(follower, 0)

    async def _resume(self, follower: _Follower) -> bool:
        """Take all that the instance holds from a snapshot; whether it gave one."""
        snapshot = await self._ask(follower.record, follower.rank)
        if snapshot is None or not follower.begins(snapshot):
            return False
        for part in snapshot.parts(_SLICE):
            follower.holds(part)
            await asyncio.sleep(0)
        follower.resumed(snapshot.number)
        return True

    async def _replay(self, follower: _Follower, start: int) -> bool:
        """Ask for batches again and take in those that come; whether none is lost."""
        record, rank = follower.record, follower.rank
        if rank < len(record.kv_replay):
            again = self._sent_again(follower, record.kv_replay[rank], start)
            if not await done_within(_REPLAY_S, again):
                logger.warning("%s did not send its KV events again in time", record.name)
        return follower.replayed()

    async def _sent_again(self, follower: _Follower, address: str, start: int) -> None:
        # vLLM answers one request with many messages, which a REQ socket does not take.
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.connect(address)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                frames = await socket.recv_multipart()
                if int.from_bytes(frames[-2], "big", signed=True) == END_OF_REPLAY:
                    return
                follower.received(frames, live=False)
        finally:
            socket.close(linger=0)


class _Follower:
    """One publisher's batches on their way to the index.

    Attributes:
        lacks: whether events came whose parents are not known.
    """

    def __init__(self, fleet: Fleet, record: Record, rank: int) -> None:
        self.record, self.rank = record, rank
        self.lacks = False
        self._fleet = fleet
        self._sequencer = Sequencer()

    def received(self, frames: list[bytes], *, live: bool) -> Ready:
        """Frames end with a number and a batch, whatever stands before."""
        try:
            batch = decoded(frames[-1])
        except ValueError as error:
            logger.warning("%s: %s", self.record.name, error)
            return Ready()
        ready = self._sequencer.received(int.from_bytes(frames[-2], "big"), batch, live=live)
        self._apply(ready)
        return ready

    def replayed(self) -> bool:
        """All has come that will; whether that is everything."""
        ready = self._sequencer.replayed()
        self._apply(ready)
        return not ready.restart

    def begins(self, snapshot: Snapshot) -> bool:
        """Forget all, to be told by a snapshot; whether it is of the KV that is followed."""
        if (snapshot.model, snapshot.block_tokens) != (
            self.record.models[0],
            self.record.block_tokens,
        ):
            logger.warning("%s gives a snapshot of other KV, which is not used", self.record.name)
            return False
        self._fleet.kv.restarted(self.record.name, self.rank)
        return True

    def holds(self, held: Held) -> None:
        """A part of the snapshot."""
        self._fleet.kv.held(self.record.name, self.rank, held)

    def resumed(self, number: int) -> None:
        """All of the snapshot has come, up to a batch; what came after it is applied."""
        self.lacks = False
        self._apply(self._sequencer.resumed(number))

    def anew(self) -> None:
        """Forget all, to be told again."""
        self._sequencer = Sequencer()
        self._fleet.kv.restarted(self.record.name, self.rank)
        self.lacks = False

    def _apply(self, ready: Ready) -> None:
        if ready.restart:
            self._fleet.kv.restarted(self.record.name, self.rank)
        for batch in ready.batches:
            if not self._fleet.kv.applied(self.record.name, self.rank, batch.events):
                self.lacks = True
