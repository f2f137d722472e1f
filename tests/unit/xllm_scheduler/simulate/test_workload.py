"""Prompts share KV exactly where the trace says so; streams come in order."""

from __future__ import annotations

import pytest

from xllm_plugins.errors import ConfigError
from xllm_scheduler.simulate.workload import (
    HASH_TOKENS,
    Ask,
    Prompts,
    Session,
    Slo,
    Stream,
    Turn,
    arrivals,
    between,
    fitting,
    scaled,
)

BLOCK = 16


def shared_blocks(first: list[int], second: list[int]) -> int:
    """Leading KV blocks that are the same."""
    blocks = 0
    while first[: (blocks + 1) * BLOCK] == second[: (blocks + 1) * BLOCK]:
        if (blocks + 1) * BLOCK > min(len(first), len(second)):
            break
        blocks += 1
    return blocks


@pytest.mark.parametrize("vocabulary", [3, 1000, 151936])
def test_equal_hash_ids_are_equal_text_up_to_the_first_that_differs(vocabulary: int) -> None:
    prompts = Prompts(vocabulary)
    first = prompts.of(Ask(0.0, 1500, 1, (0, 1, 2)))
    second = prompts.of(Ask(0.0, 1400, 1, (0, 1, 3)))
    assert (len(first), len(second)) == (1500, 1400)
    assert shared_blocks(first, second) == 2 * HASH_TOKENS // BLOCK


def test_requests_without_hash_ids_share_nothing() -> None:
    prompts = Prompts(1000)
    asks = [Ask(0.0, 64, 1), Ask(0.0, 64, 1), Ask(0.0, 512, 1, (7,))]
    texts = [prompts.of(ask) for ask in asks]
    blocks = {tuple(text[:BLOCK]) for text in texts}
    assert len(blocks) == 3


def test_all_streams_come_in_order_of_time() -> None:
    chat = Stream("chat", True, Slo(1, 1), asks=[Ask(1.0, 1, 1), Ask(3.0, 1, 1)])
    talk = Stream("talk", True, Slo(1, 1), sessions=[Session(2.0, [Turn(1, 1, 0.0)])])
    batch = Stream("batch", False, asks=[Ask(0.0, 1, 1)], outstanding=1)
    assert [(at_s, index) for at_s, index, _ in arrivals([chat, talk, batch])] == [
        (1.0, 0),
        (2.0, 1),
        (3.0, 0),
    ]


def test_a_window_begins_at_zero_and_a_rate_shrinks_the_gaps() -> None:
    asks = [Ask(float(at_s), 1, 1) for at_s in range(5)]
    assert [a.at_s for a in between(asks, 1.0, 4.0)] == [0.0, 1.0, 2.0]
    assert [a.at_s for a in scaled(asks, 2.0)] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_what_a_model_cannot_take_is_left_out_and_counted() -> None:
    long = Session(0.0, [Turn(40, 20, 0.0), Turn(40, 20, 0.0)])
    stream = Stream("s", True, asks=[Ask(0.0, 90, 10), Ask(0.0, 91, 10)], sessions=[long])
    kept, dropped = fitting(stream, 100)
    assert ([a.prompt_tokens for a in kept.asks], list(kept.sessions), dropped) == ([90], [], 2)


def test_a_backlog_has_no_sessions() -> None:
    with pytest.raises(ConfigError, match="sessions and a backlog"):
        Stream("s", False, sessions=[Session(0.0, [Turn(1, 1, 0.0)])], outstanding=2)
