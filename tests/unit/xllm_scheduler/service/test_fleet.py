"""All that a router knows, driven as the service and the simulator drive it."""

from __future__ import annotations

import pytest

from xllm_kv.events import BlockStored
from xllm_kv.index import Prompt
from xllm_scheduler.service.aware import KvAware
from xllm_scheduler.service.breaker import Breaker
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.load import Beat
from xllm_scheduler.service.registry import Health, Record
from xllm_scheduler.service.routing import RequestView, Role
from xllm_scheduler.service.staged import least_loaded, round_robin

TIMES = {"base": 10.0, "token": 0.1, "decode": 0.5}
TOKENS = list(range(64))


def record(name: str, **more: object) -> Record:
    fields = {"models": ("m",), "block_tokens": 16, "step_time": TIMES, **more}
    return Record(name, f"http://{name}", **fields)  # type: ignore[arg-type]


def fleet(*names: str, **more: object) -> Fleet:
    made = Fleet(KvAware(), **more)  # type: ignore[arg-type]
    for name in names:
        assert made.join(record(name), 0.0)
    return made


def ask(name: str = "r", tokens: int = 64) -> RequestView:
    return RequestView(name, True, tokens, 1000.0, 50.0, output_tokens=100.0)


def at(found: Fleet, request: RequestView, **more: object) -> str:
    route = found.place(request, 0.0, **more)  # type: ignore[arg-type]
    return "" if route is None else route.prefill


def test_a_prompt_goes_where_its_kv_lies() -> None:
    one = fleet("a", "b")
    one.kv.applied("b", 0, [BlockStored([1, 2, 3, 4], None, TOKENS, 16, "GPU")])
    assert at(one, ask(), prompt=Prompt("m", TOKENS), model="m") == "b"
    decision = one.decision("r")
    assert decision is not None
    assert decision.cached == {"b": 64.0}
    one.kv.restarted("b", 0)
    assert one.index.match(Prompt("m", TOKENS)) == {}


@pytest.mark.parametrize("known", ["a", "b", ""])
def test_who_does_not_know_its_step_times_is_not_taken_for_free(known: str) -> None:
    one = Fleet(KvAware())
    for name in ("a", "b"):
        one.join(record(name, step_time=TIMES if name == known else {}), 0.0)
    one.kv.applied("b", 0, [BlockStored([1, 2, 3], None, TOKENS[:48], 16, "GPU")])
    assert at(one, ask(), prompt=Prompt("m", TOKENS)) == "b"
    one.learned("a", TIMES)
    assert all(view.step_time.base == 10.0 for view in one.views(0.0))


def test_kv_in_slower_tiers_counts_for_less() -> None:
    one = fleet("a", "b")
    one.kv.applied("a", 0, [BlockStored([1, 2], None, TOKENS[:32], 16, "GPU")])
    one.kv.applied("b", 0, [BlockStored([1, 2, 3], None, TOKENS[:48], 16, "STORAGE")])
    assert at(one, ask(), prompt=Prompt("m", TOKENS)) == "a"
    decision = one.decision("r")
    assert decision is not None
    assert decision.cached == {"a": 32.0, "b": 12.0}


def test_only_instances_that_serve_the_model_are_asked() -> None:
    one = fleet("a")
    one.join(record("b", models=("other",)), 0.0)
    assert {at(one, ask(f"r{n}"), model="other") for n in range(3)} == {"b"}
    assert at(one, ask("none"), model="unknown") == ""


def test_an_instance_that_failed_a_request_is_left_out_of_its_next_try() -> None:
    one = fleet("a", "b")
    first = at(one, ask())
    one.failed("r", first, 0.0)
    assert at(one, ask(), without=[first]) == ({"a", "b"} - {first}).pop()


def test_one_that_keeps_failing_is_left_alone_for_all() -> None:
    one = fleet("a", "b", new_breaker=lambda: Breaker(failures=2))
    for number in range(2):
        one.place(ask(f"r{number}"), 0.0)
        one.failed(f"r{number}", "a", 0.0)
    assert {at(one, ask(f"s{n}")) for n in range(6)} == {"b"}
    assert one.registry.members["a"].health is Health.READY


def test_one_that_was_down_and_is_back_is_not_blamed_for_what_was_before() -> None:
    one = fleet("a", "b", new_breaker=lambda: Breaker(failures=1))
    one.place(ask("r"), 0.0)
    one.failed("r", "a", 0.0)
    one.back("a")
    one.back("nobody")
    assert {at(one, ask(f"s{n}")) for n in range(6)} == {"a", "b"}


def test_draining_and_roles_are_seen_by_policies() -> None:
    one = fleet("a", "b")
    one.drain("a", True)
    one.set_role("b", Role.PREFILL, 1.0)
    views = {view.instance_id: view for view in one.views(1.0)}
    assert (views["a"].accepts, views["b"].role) == (False, Role.PREFILL)
    assert list(one.changes) == [(1.0, "b", Role.PREFILL)]
    one.drain("a", False)
    assert all(view.accepts for view in one.views(1.0))


def test_what_was_there_before_a_restart_is_forgotten() -> None:
    one = fleet("a")
    one.kv.applied("a", 0, [BlockStored([1], None, TOKENS[:16], 16, "GPU")])
    one.beat("a", "", Beat(waiting=3), 0.0)
    assert not one.join(record("a"), 1.0)  # its lease was back
    assert one.views(1.0)[0].waiting == 3
    assert one.join(record("a", incarnation="2"), 2.0)
    assert one.views(2.0)[0].waiting == 0
    assert len(one.index) == 0
    assert not one.beat("a", "", Beat(), 3.0)


def test_silence_ends_in_oblivion() -> None:
    one = Fleet(round_robin())
    one.join(record("a"), 0.0)
    one.unanswered("a", 1.0)
    assert at(one, ask()) == ""
    assert one.tick(17.0) == ["a"]
    assert one.views(17.0) == []
    one.failed("r", "a", 18.0)  # told late


def test_expected_answers_are_as_long_as_the_last_ones_were() -> None:
    one = Fleet(least_loaded())
    one.join(record("a"), 0.0)
    one.place(ask("first"), 0.0)
    one.finished(ask("first"), 20, 1.0)
    one.place(ask("second"), 1.0)
    decision = one.decision("second")
    assert decision is not None
    assert decision.expected == 20.0
    assert (one.tally[True].placed, one.tally[True].finished) == (2, 1)


def test_a_rank_is_chosen_by_kv_then_by_load() -> None:
    one = Fleet(KvAware())
    one.join(record("a", dp_size=3), 0.0)
    one.kv.applied("a", 2, [BlockStored([1, 2, 3, 4], None, TOKENS, 16, "GPU")])

    def rank(name: str, tokens: list[int]) -> int:
        one.place(ask(name), 0.0, prompt=Prompt("m", tokens))
        decision = one.decision(name)
        assert decision is not None
        return decision.ranks["a"]

    other = [t + 500 for t in TOKENS]
    assert rank("r0", TOKENS) == 2
    assert [rank(f"s{n}", [t + 1000 * n for t in other]) for n in range(1, 3)] == [0, 1]
    one.finished(ask("s1"), 5, 1.0)
    one.dropped("s1")  # told twice
    assert rank("s9", [t + 9000 for t in other]) == 0
    assert rank("s1b", [t + 1000 for t in other]) == 0  # what was just sent there counts as there


def test_text_stands_for_tokens_that_are_not_known() -> None:
    one = fleet("a", "b")
    text = b"You are a helpful assistant. " * 20
    tokens = len(text) // 4
    first = at(one, ask("r", tokens), prompt=Prompt.of_text("m", text))
    again: list[str] = []
    for number in range(5):
        one.dropped("r" if not again else f"r{number - 1}")
        longer = Prompt.of_text("m", text + b"x" * number)
        again.append(at(one, ask(f"r{number}", tokens), prompt=longer))
    assert set(again) == {first}
    decision = one.decision("r4")
    assert decision is not None
    assert decision.cached[first] >= tokens - 16
    one.leave(first)
    one.join(record(first), 1.0)
    one.place(ask("late"), 1.0, prompt=Prompt.of_text("m", text))
    late = one.decision("late")
    assert late is not None
    assert late.cached.get(first, 0.0) == 0.0


def ranked(*names: str) -> Fleet:
    made = Fleet(KvAware())
    for name in names:
        made.join(record(name, dp_size=4), 0.0)
    return made


def test_ranks_share_the_work_though_one_holds_a_common_beginning() -> None:
    one = ranked("a")
    one.kv.applied("a", 2, [BlockStored([1], None, TOKENS[:16], 16, "GPU")])
    ranks = []
    for number in range(40):
        tokens = [*TOKENS[:16], *range(100 * number, 100 * number + 200)]
        one.place(ask(f"r{number}", 216), 0.0, prompt=Prompt("m", tokens))
        decision = one.decision(f"r{number}")
        assert decision is not None
        ranks.append(decision.ranks["a"])
    assert ranks[0] == 2
    assert {rank: ranks.count(rank) for rank in range(4)} == {0: 10, 1: 10, 2: 10, 3: 10}


def test_a_rank_with_less_to_do_is_not_left_out_for_ever_after_an_instance_returns() -> None:
    one = ranked("a")
    for number in range(4):
        one.place(ask(f"r{number}"), 0.0)
    one.leave("a")
    one.join(record("a", dp_size=4, incarnation="2"), 1.0)
    for number in range(4):
        one.dropped(f"r{number}")  # of the one before
    found = set()
    for number in range(4):
        one.place(ask(f"s{number}"), 1.0)
        decision = one.decision(f"s{number}")
        assert decision is not None
        found.add(decision.ranks["a"])
    assert found == {0, 1, 2, 3}


def test_fewer_ranks_after_a_restart_leave_nothing_behind() -> None:
    one = ranked("a")
    one.kv.applied("a", 3, [BlockStored([1], None, TOKENS[:16], 16, "GPU")])
    one.join(record("a", dp_size=2, incarnation="2"), 1.0)
    assert one.index.match(Prompt("m", TOKENS)) == {}
    assert one.place(ask(), 1.0, prompt=Prompt("m", TOKENS)) is not None


def test_where_no_events_tell_what_was_sent_counts() -> None:
    one = Fleet(KvAware())
    one.join(record("a", block_tokens=0), 0.0)
    one.join(record("b"), 0.0)
    one.kv.applied("b", 0, [BlockStored([1], None, TOKENS[:16], 16, "GPU")])
    one.place(ask("r0"), 0.0, prompt=Prompt("m", TOKENS), without=["b"])
    one.finished(ask("r0"), 1, 1.0)
    assert at(one, ask("r1"), prompt=Prompt("m", TOKENS)) == "a"
    decision = one.decision("r1")
    assert decision is not None
    assert decision.cached == {"a": 64.0, "b": 16.0}


def test_adapters_and_other_names_find_their_kv() -> None:
    prompt = Prompt("m", TOKENS, lora="adapter")
    one = fleet()
    one.join(record("a", models=("m", "alias", "adapter"), loras=("adapter",)), 0.0)
    one.kv.applied("a", 0, [BlockStored([1], None, TOKENS[:16], 16, "GPU", [("adapter",)])])
    assert one.index.match(prompt)["a#0"].total == 16
    assert one.index.match(Prompt("m", TOKENS)) == {}


def test_one_that_offered_no_kv_is_asked_again_after_a_while() -> None:
    one = fleet("a")
    one.cannot_transfer("a", 0.0)
    assert not one.views(10.0)[0].transfers
    assert one.views(100.0)[0].transfers


def test_a_trial_that_is_dropped_lets_another_one_try() -> None:
    one = fleet("a", new_breaker=lambda: Breaker(failures=1, open_s=10.0))
    one.place(ask("r"), 0.0)
    one.failed("r", "a", 0.0)
    assert one.place(ask("s"), 11.0) is not None
    assert one.place(ask("t"), 11.0) is None
    one.dropped("s")
    assert one.place(ask("t"), 11.0) is not None


def test_what_moving_kv_takes_is_learned_beside_a_step() -> None:
    one = fleet("a", "b")
    one.set_role("a", Role.PREFILL, 0.0)
    one.set_role("b", Role.DECODE, 0.0)
    one.routing = least_loaded()
    for number in range(30):
        tokens = 1000 * (1 + number % 4)
        one.place(ask(f"r{number}", tokens), 0.0)
        one.first_token(f"r{number}")
        generates_ms = 10.0 + 0.5  # a step of one request
        one.moved(f"r{number}", generates_ms + 40.0 + 0.03 * tokens, 0.0)
        one.finished(ask(f"r{number}", tokens), 10, 0.0)
    found = {view.instance_id: view for view in one.views(0.0)}["b"]
    assert found.transfer_ms == pytest.approx(40.0, rel=0.1)
    assert found.transfer_token_ms == pytest.approx(0.03, rel=0.1)
    one.moved("r0", 1.0, 0.0)  # over already
    assert {view.instance_id: view for view in one.views(0.0)}["b"] == found
