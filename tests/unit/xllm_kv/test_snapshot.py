"""A snapshot and the events after it are as good as all events from the first one on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.xllm_kv.test_index import BLOCKS, MODEL, PROMPT, SIZE, Engine, index_of, lengths
from xllm_kv.events import AllBlocksCleared, Batch, Event, Sequencer
from xllm_kv.index import KvIndex
from xllm_kv.ledger import Ledger
from xllm_kv.snapshot import Snapshot


class Publisher:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def publish(self, batch: Batch) -> None:
        self.batches.append(batch)

    def shutdown(self) -> None:
        self.batches.clear()


def ledger(groups: tuple[int, ...] = (0,)) -> Ledger:
    return Ledger(Publisher(), MODEL, SIZE, groups)


def read(of: Ledger) -> Snapshot:
    """A snapshot that has gone over the wire."""
    taken = of.snapshot()
    assert taken is not None
    return Snapshot.read(taken)


def fill(index: KvIndex, snapshot: Snapshot, name: str = "a") -> None:
    index.clear(name)
    for part in snapshot.parts(3):
        index.load(name, part)


def test_a_snapshot_says_what_lies_in_which_tier() -> None:
    a, of = Engine("a"), ledger()
    of.publish(Batch(0.0, [a.stores(PROMPT), a.stores(PROMPT[:8], "CPU")]))
    of.publish(Batch(0.0, [a.removes(PROMPT[:16]), a.stores(PROMPT, "STORAGE")]))
    index, snapshot = index_of(a), read(of)
    fill(index, snapshot)
    assert snapshot.number == 2
    assert lengths(index, PROMPT) == {"a": (12, 0, 4, 0)}
    assert len(index) == 3 + 2 + 4


def test_a_block_whose_parent_has_gone_comes_along_and_has_children_again() -> None:
    a, of = Engine("a"), ledger()
    of.publish(Batch(0.0, [a.stores(PROMPT[:8]), a.removes(PROMPT[:4])]))
    index = index_of(a)
    fill(index, read(of))
    assert lengths(index, PROMPT) == {}
    assert index.apply("a", [a.extends(PROMPT[:8], PROMPT[8:]), a.stores(PROMPT[:4])])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0)}
    assert index.counts.unknown_parents == 0


def test_salts_and_groups_come_along() -> None:
    a, of = Engine("a"), ledger(groups=(0, 2))
    of.publish(Batch(0.0, [a.stores(PROMPT[:8], extra_keys=[("s",), None], group_idx=0)]))
    of.publish(Batch(0.0, [a.stores(PROMPT[:4], extra_keys=[("s",)], group_idx=2)]))
    index = KvIndex()
    index.add("a", MODEL, SIZE, groups=(0, 2))
    fill(index, read(of))
    assert lengths(index, PROMPT, salt="s") == {"a": (4, 0, 0, 0)}
    assert lengths(index, PROMPT) == {}


def test_names_may_be_numbers_or_hashes() -> None:
    a, of = Engine("a"), ledger()
    event = a.stores(PROMPT)
    event.block_hashes = [2**64 - 1, b"\x00" * 32, 0, b"b"]
    of.publish(Batch(0.0, [event]))
    index = index_of(a)
    fill(index, read(of))
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0)}


@pytest.mark.parametrize("payload", [b"", b"\x00", b"not a snapshot"])
def test_what_is_no_snapshot_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="no snapshot"):
        Snapshot.read(payload)


def test_what_was_published_before_a_snapshot_is_not_applied_again() -> None:
    sequencer = Sequencer()
    sequencer.received(3, Batch(3.0, []))
    sequencer.received(6, Batch(6.0, []))
    ready = sequencer.resumed(5)
    assert (ready.batches, ready.restart) == ((), False)
    assert not sequencer.received(4, Batch(4.0, []), live=False).batches
    ready = sequencer.received(5, Batch(5.0, []), live=False)
    assert [batch.ts for batch in ready.batches] == [5.0, 6.0]
    assert ready.replay_from is None


def test_live_batches_that_waited_while_a_snapshot_was_taken_are_no_restart() -> None:
    sequencer = Sequencer()
    sequencer.received(0, Batch(0.0, []))
    sequencer.resumed(3)
    for number, due in ((1, []), (2, []), (3, [3.0])):
        ready = sequencer.received(number, Batch(float(number), []))
        assert ([batch.ts for batch in ready.batches], ready.restart) == (due, False)
    assert sequencer.restarts == sequencer.gaps == 0


def test_a_snapshot_of_an_engine_that_began_anew_is_followed_on() -> None:
    sequencer = Sequencer()
    for number in range(5):
        sequencer.received(number, Batch(float(number), []))
    sequencer.resumed(2)
    ready = sequencer.received(2, Batch(2.0, []))
    assert (len(ready.batches), ready.restart) == (1, False)


def test_the_publisher_is_passed_everything_and_still_answers() -> None:
    of = ledger()
    batch = Batch(0.0, [AllBlocksCleared()])
    of.publish(batch)
    assert of.batches == [batch]
    of.shutdown()
    assert of.batches == []


def test_what_it_cannot_read_ends_the_ledger_and_not_the_engine() -> None:
    a, of = Engine("a"), ledger()
    event = a.stores(PROMPT)
    event.token_ids = [-1, *event.token_ids[1:]]
    for _ in range(2):
        of.publish(Batch(0.0, [event]))
    assert len(of.batches) == 2
    assert of.snapshot() is None


def test_it_keeps_to_its_bound() -> None:
    a, of = Engine("a"), Ledger(Publisher(), MODEL, SIZE, (0,), most_blocks=3)
    of.publish(Batch(0.0, [a.stores(PROMPT)]))
    assert sum(len(part.names) for part in read(of).parts(100)) == 3


STEPS = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "clear"]), st.sampled_from(["GPU", "CPU"]),
              BLOCKS), max_size=30)  # fmt: skip


@given(steps=STEPS, at=st.integers(0, 30), again=st.integers(0, 30), asked=BLOCKS)
def test_wherever_it_is_taken_the_index_is_that_of_all_events(
    steps: list[tuple[str, str, list[int]]], at: int, again: int, asked: list[int]
) -> None:
    """Batches before the snapshot come once more, as they do from a publisher's buffer."""
    a, of = Engine("a"), ledger()
    batches = [Batch(float(n), [_event(a, *step)]) for n, step in enumerate(steps)]
    at = min(at, len(batches))
    for batch in batches[:at]:
        of.publish(batch)
    whole, found, sequencer = index_of(a), index_of(a), Sequencer()
    for batch in batches:
        whole.apply("a", batch.events)
    snapshot = read(of)
    fill(found, snapshot)
    due = list(sequencer.resumed(snapshot.number).batches)
    for number in range(min(again, at), len(batches)):
        due += sequencer.received(number, batches[number]).batches
    for batch in due:
        assert found.apply("a", batch.events)
    tokens = [t for t in asked for _ in range(SIZE)]
    assert lengths(found, tokens) == lengths(whole, tokens)
    assert len(found) == len(whole)


def _event(engine: Engine, what: str, medium: str, blocks: list[int]) -> Event:
    tokens: list[int] = [b for b in blocks for _ in range(SIZE)]
    if what == "clear":
        return AllBlocksCleared()
    made: Any = engine.stores if what == "store" else engine.removes
    event: Event = made(tokens, medium)
    return event
