"""Batches of KV events: in order, asked for again when some are missing, never applied twice."""

from __future__ import annotations

import msgspec
import pytest

from xllm_kv.events import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    Ready,
    Sequencer,
    decoded,
)


def batch(number: int) -> Batch:
    return Batch(float(number), [])


def numbers(ready: Ready) -> list[int]:
    return [round(one.ts) for one in ready.batches]


def test_what_comes_in_order_is_applied_at_once() -> None:
    sequencer = Sequencer()
    assert [numbers(sequencer.received(n, batch(n))) for n in range(3)] == [[0], [1], [2]]


def test_a_gap_is_asked_for_once_and_filled() -> None:
    sequencer = Sequencer()
    sequencer.received(0, batch(0))
    assert sequencer.received(3, batch(3)) == Ready(replay_from=1)
    assert sequencer.received(4, batch(4)) == Ready()
    assert numbers(sequencer.received(1, batch(1), live=False)) == [1]
    assert numbers(sequencer.received(2, batch(2), live=False)) == [2, 3, 4]
    assert sequencer.replayed() == Ready()
    assert (sequencer.gaps, sequencer.lost, sequencer.restarts) == (1, 0, 0)
    assert numbers(sequencer.received(5, batch(5))) == [5]


def test_what_is_lost_for_good_makes_what_was_known_void() -> None:
    sequencer = Sequencer()
    sequencer.received(0, batch(0))
    sequencer.received(5, batch(5))
    sequencer.received(4, batch(4), live=False)  # the publisher's buffer begins there
    ready = sequencer.replayed()
    assert (ready.restart, numbers(ready)) == (True, [4, 5])
    assert sequencer.lost == 3


def test_who_comes_late_asks_for_what_was_before() -> None:
    sequencer = Sequencer()
    assert sequencer.received(7, batch(7)).replay_from == 0
    for number in range(7):
        sequencer.received(number, batch(number), live=False)
    assert numbers(sequencer.received(8, batch(8))) == [8]


@pytest.mark.parametrize("first", [0, 4])
def test_numbers_that_begin_anew_are_a_restart(first: int) -> None:
    sequencer = Sequencer()
    for number in range(10):
        sequencer.received(number, batch(number))
    ready = sequencer.received(first, batch(first))
    assert ready.restart
    assert numbers(ready) == ([0] if first == 0 else [])
    assert ready.replay_from == (None if first == 0 else 0)
    assert sequencer.restarts == 1


def test_a_replay_of_what_is_known_changes_nothing() -> None:
    sequencer = Sequencer()
    for number in range(3):
        sequencer.received(number, batch(number))
    assert [sequencer.received(n, batch(n), live=False) for n in range(3)] == [Ready()] * 3


def test_the_wire_is_read_as_vllm_writes_it() -> None:
    stored = {
        "type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": None, "medium": "GPU",
        "lora_name": None, "extra_keys": [["a"], None], "group_idx": 0, "session_id": "s",
    }  # fmt: skip
    removed = {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}
    payload = msgspec.msgpack.encode([1.5, [stored, removed, {"type": "AllBlocksCleared"}], 1])
    found = decoded(payload)
    assert (found.ts, found.data_parallel_rank) == (1.5, 1)
    assert found.events == [
        BlockStored([1, 2], None, [1, 2, 3, 4], 2, "GPU", [["a"], None], 0),
        BlockRemoved([1], "GPU"),
        AllBlocksCleared(),
    ]
    with pytest.raises(ValueError, match="cannot be read"):
        decoded(b"\x00")


def test_the_older_wire_without_names_is_read_too() -> None:
    stored = ["BlockStored", [1, 2], None, [1, 2, 3, 4], 2, None, "GPU", None, [["a"], None], 0]
    events = [stored, ["BlockRemoved", [1], "GPU"], ["AllBlocksCleared"]]
    assert decoded(msgspec.msgpack.encode([1.5, events])).events == [
        BlockStored([1, 2], None, [1, 2, 3, 4], 2, "GPU", [["a"], None], 0),
        BlockRemoved([1], "GPU"),
        AllBlocksCleared(),
    ]
