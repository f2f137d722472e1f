"""What xLLM's own co-location tests expect, of our scheduler in a real vLLM.

Blocks are of 4 tokens here instead of 32, and prompts an eighth as long.
"""

from __future__ import annotations

import pytest

from tests.contract.engine import BOTH, OFFLINE, Clock, Engine, build, check_kv_books, request
from tests.contract.worker import completion
from xllm_plugins.latency import StepShape
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = pytest.mark.vllm


def _engine(base: type, clock: Clock, blocks: int) -> Engine:
    """An engine whose speed the scheduler has learned."""
    engine = Engine(build(elastic_class(base), blocks=blocks), clock)
    for i in range(1, 17):
        shape = StepShape(prefill_tokens=4 * i, prefill_squares=16 * i * i, decodes=i % 4)
        engine.scheduler._model.observe(shape, 5.0 + engine.token_ms * shape.tokens)
    return engine


@BOTH
def test_on_decode_preempt_off_decode(base: type, clock: Clock) -> None:
    """As xLLM: where both need another block and none is left, the offline request loses its own.

    xLLM admits both at once. Ours keeps an online prompt's worth of blocks free where online
    requests come, so the offline one has to be there first.
    """
    engine = _engine(base, clock, blocks=9)  # one is vLLM's null block
    engine.add(request("offline", [1] * 13, max_tokens=12, xargs=OFFLINE))
    for _ in range(engine.depth):
        engine.step()
    engine.add(request("online", [2] * 15, max_tokens=12))
    for _ in range(30):
        engine.step()
        if len(engine.streams["online"]) == 12:
            break
        check_kv_books(engine.scheduler)
    preempted = {
        sample.labels: sample.value
        for sample in engine.scheduler.xllm_report().samples
        if sample.name == "scheduler_preempted"
    }
    assert preempted == {("online",): 0, ("offline",): 1}
    assert engine.scheduler.requests.keys() == {"offline"}
    engine.run()
    assert engine.streams["online"] == completion([2] * 15, 12)
    assert engine.streams["offline"] == completion([1] * 13, 12)


@BOTH
def test_who_was_preempted_does_not_preempt_back(base: type, clock: Clock) -> None:
    """As xLLM's PreemptSchedule: from its first token on the online request is in every step."""
    engine = _engine(base, clock, blocks=9)
    engine.add(request("offline", [1] * 13, max_tokens=12, xargs=OFFLINE))
    for _ in range(engine.depth):
        engine.step()
    engine.add(request("online", [2] * 15, max_tokens=12))
    engine.run()
    mine = [index for index, step in enumerate(engine.steps) if "online" in step]
    assert mine == list(range(mine[0], mine[-1] + 1))
    assert len(mine) == 12
    check_kv_books(engine.scheduler)


@BOTH
def test_chunked_where_kv_suffices_for_one_of_two_prompts_one_runs(
    base: type, clock: Clock
) -> None:
    """As xLLM: two blocks, and two prompts of two blocks."""
    engine = _engine(base, clock, blocks=3)
    engine.add(request("a", [1] * 7, max_tokens=2), request("b", [2] * 7, max_tokens=2))
    assert engine.step() == {"a": 7}
    engine.run()
    assert engine.streams["b"] == completion([2] * 7, 2)
