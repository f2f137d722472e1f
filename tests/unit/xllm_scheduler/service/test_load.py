"""The books of a router: what it sent, and what instances report."""

from __future__ import annotations

import pytest

from xllm_plugins.latency import StepTime
from xllm_scheduler.service.load import Beat, Facts, LoadBook
from xllm_scheduler.service.routing import InstanceView, RequestView, Role

FACTS = Facts(StepTime(base=10.0, token=0.1, ready=True), kv_tokens=10_000)


@pytest.fixture
def book() -> LoadBook:
    made = LoadBook()
    made.add("a", Role.PREFILL, FACTS)
    made.add("b", Role.DECODE, FACTS)
    return made


def ask(name: str = "r", tokens: int = 1000, **cached: float) -> RequestView:
    return RequestView(name, True, tokens, cached=cached)


def views(book: LoadBook, now_s: float = 0.0) -> dict[str, InstanceView]:
    return {view.instance_id: view for view in book.views(now_s)}


def test_a_request_waits_then_runs_then_is_gone(book: LoadBook) -> None:
    book.placed(ask(a=400.0), "a", "a", 0.0)
    waits = views(book)["a"]
    assert (waits.waiting, waits.running, waits.waiting_tokens) == (1, 0, 600)
    assert waits.waiting_ms == pytest.approx(60.0)
    assert waits.kv_used == pytest.approx(0.1)
    book.first_token("r")
    runs = views(book)["a"]
    assert (runs.waiting, runs.running, runs.context_tokens) == (0, 1, 1000)
    book.finished("r")
    gone = views(book)["a"]
    assert (gone.waiting, gone.running, gone.waiting_ms, gone.context_tokens) == (0, 0, 0.0, 0)


def test_a_request_that_moves_is_reckoned_with_where_it_goes(book: LoadBook) -> None:
    book.placed(ask(), "a", "b", 0.0)
    assert (views(book)["a"].waiting, views(book)["b"].running) == (1, 1)
    book.beat("b", Beat())  # the instance has not heard of it yet
    assert views(book)["b"].running == 1
    book.first_token("r")
    assert (views(book)["a"].waiting, views(book)["b"].running) == (0, 1)
    assert views(book)["b"].context_tokens == 1000
    book.finished("r")
    assert views(book)["b"].running == 0


@pytest.mark.parametrize("moves", [False, True])
def test_a_request_that_fails_before_its_first_token_leaves_nothing(
    book: LoadBook, moves: bool
) -> None:
    book.placed(ask(), "a", "b" if moves else "a", 0.0)
    book.finished("r")
    for view in views(book).values():
        assert (view.waiting, view.running, view.waiting_tokens, view.kv_used) == (0, 0, 0, 0.0)
    book.finished("r")  # told twice


def test_a_report_is_believed_and_what_came_after_it_is_added(book: LoadBook) -> None:
    book.placed(ask("first"), "a", "a", 0.0)
    book.beat("a", Beat(3, 5, 900, 7000, 0.5))
    book.placed(ask("second", 100), "a", "a", 0.1)
    view = views(book)["a"]
    assert (view.waiting, view.running, view.waiting_tokens) == (4, 5, 1000)
    assert view.waiting_ms == pytest.approx(100.0)
    assert view.kv_used == pytest.approx(0.51)


def test_the_share_of_prefills_fades(book: LoadBook) -> None:
    for number in range(100):
        book.placed(ask(f"r{number}"), "a", "a", number / 10.0)
    now = views(book, 9.9)["a"].prefill_share
    assert now == pytest.approx(1.0 - 2.718281828**-1, rel=0.05)  # 100 ms each 100 ms, for 10 s
    assert views(book, 19.9)["a"].prefill_share == pytest.approx(now / 2.718281828, rel=0.01)


def test_what_was_sent_before_a_restart_is_not_counted_after_it(book: LoadBook) -> None:
    book.placed(ask("old"), "a", "a", 0.0)
    book.first_token("old")
    book.add("a", Role.PREFILL, FACTS)
    book.placed(ask("new"), "a", "a", 1.0)
    book.finished("old")
    view = views(book)["a"]
    assert (view.waiting, view.running, view.waiting_tokens) == (1, 0, 1000)
    assert view.kv_used == pytest.approx(0.1)


def test_it_goes_on_after_an_instance_has_gone(book: LoadBook) -> None:
    book.placed(ask(), "a", "b", 0.0)
    book.remove("b")
    book.first_token("r")
    book.remove("a")
    book.finished("r")
    assert views(book) == {}
