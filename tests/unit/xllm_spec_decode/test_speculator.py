"""One engine's speculation: whatever happens to requests or drafters, each gets its own draft."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_spec_decode.drafters import Drafter, Drafts, PromptLookup, Rows
from xllm_spec_decode.recent import RecentOutputs
from xllm_spec_decode.slots import Request
from xllm_spec_decode.speculator import Speculator, Step

MOST, SLOTS, LENGTH = 4, 6, 400
CYCLE = [11, 12, 13, 14, 15]


class Broken(Drafter):
    """Fails at one of its tasks."""

    def __init__(self, at: str) -> None:
        self._at = at

    def _do(self, task: str) -> None:
        if task == self._at:
            raise RuntimeError("no drafts today")

    def learn(self, rows: Rows) -> None:
        self._do("learn")

    def forget(self, slot: int) -> None:
        self._do("forget")

    def draft(self, rows: Rows, drafts: Drafts) -> None:
        drafts.lengths[:] = MOST
        drafts.tokens[:] = 999
        drafts.matches[:] = 30
        self._do("draft")


class Engine:
    """Requests that say what their texts say, with the drafts that they are given verified."""

    def __init__(self, drafters: Mapping[str, Drafter] | None = None) -> None:
        given = {"ngram": PromptLookup(SLOTS, 64), "suffix": RecentOutputs(SLOTS, 1 << 17)}
        self.speculator = Speculator(given if drafters is None else drafters, SLOTS, MOST)
        self.texts: dict[str, list[int]] = {}
        self.said: dict[str, int] = {}
        self.drafts: dict[str, list[int]] = {}
        self._new: dict[str, Request] = {}
        self._gone: list[str] = []
        self._now_s = 0.0
        self.token_ms = 2.0

    def add(self, name: str, text: Sequence[int], request: Request | None = None) -> None:
        self.texts[name], self.said[name] = list(text), 3
        self._new[name] = request or Request("tenant")

    def end(self, name: str) -> None:
        del self.texts[name], self.said[name]
        self.drafts.pop(name, None)
        self._gone.append(name)

    def step(self, names: Sequence[str] | None = None) -> dict[str, list[int]]:
        """One step of these requests, all by default; the drafts for the next one."""
        names = list(self.texts if names is None else names)
        drafted = {name: self.drafts[name] for name in names if self.drafts.get(name)}
        tokens = np.zeros((SLOTS, LENGTH), np.int32)
        said = []
        for row, name in zip(tokens, names, strict=False):
            text, begin = self.texts[name], self.said[name]
            right = 0
            for token in drafted.get(name, []):
                if token != text[begin + right]:
                    break
                right += 1
            said.append(text[begin : begin + right + 1])
            self.said[name] = begin + right + 1
            row[: self.said[name]] = text[: self.said[name]]
        many = {name: len(draft) for name, draft in drafted.items()}
        new = {name: self._new.pop(name) for name in names if name in self._new}
        step = Step(
            names, new, self._gone, many, len(names) + sum(many.values()),
            np.full(len(names), 3, np.int64),
        )  # fmt: skip
        lengths = np.array([self.said[name] for name in names], np.int64)
        self._now_s += (20.0 + self.token_ms * step.computed_tokens) / 1e3
        found = self.speculator.propose(step, said, lengths, tokens, self._now_s)
        self._gone = []
        self.drafts = dict(zip(names, found, strict=True))
        return self.drafts

    def facts(self) -> dict[str, Any]:
        return self.speculator.facts()


def test_a_text_that_repeats_itself_is_said_in_fewer_steps() -> None:
    engine, steps = Engine(), 0
    engine.add("one", CYCLE * 40)
    while engine.said["one"] < 150:
        engine.step()
        steps += 1
    assert steps < 75
    found = engine.facts()
    assert sum(found["accepted"].values()) == 150 - 3 - steps + engine.said["one"] - 150
    assert found["acceptance"]["ngram"] > 0.5


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    engine = Engine()
    engine.add("one", list(range(300)))
    assert not any(any(engine.step().values()) for _ in range(100))


def test_a_large_batch_finds_out_that_drafts_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SLOTS", 400)
    engine = Engine({"ngram": PromptLookup(400, 64)})
    engine.token_ms = 0.1
    for i in range(400):
        engine.add(str(i), CYCLE * 40)
    for _ in range(30):
        engine.step()
    assert sum(map(len, engine.step().values())) > 1000


def test_drafts_that_are_never_right_end() -> None:
    rng = random.Random(0)
    engine = Engine()
    engine.add("one", [token for _ in range(60) for token in (1, 2, rng.randrange(10, 10**6))])
    drafted = [len(engine.step()["one"]) for _ in range(150)]
    assert sum(drafted[:60]) > 0
    assert sum(drafted[90:]) == 0


@pytest.mark.parametrize("task", ["learn", "forget", "draft"])
def test_a_drafter_that_fails_is_switched_off_and_the_others_go_on(task: str) -> None:
    engine = Engine({"broken": Broken(task), "ngram": PromptLookup(SLOTS, 64)})
    engine.add("one", CYCLE * 40)
    drafts = [engine.step()["one"] for _ in range(20)]
    assert all(999 not in draft for draft in drafts)
    assert any(drafts)
    assert engine.facts()["failed"] == {"broken": "RuntimeError: no drafts today"}


def test_all_drafters_may_fail() -> None:
    engine = Engine({"broken": Broken("learn")})
    engine.add("one", CYCLE * 40)
    assert not any(engine.step()["one"] for _ in range(5))


def test_a_strict_request_keeps_a_step_without_drafts() -> None:
    engine = Engine()
    engine.add("loose", CYCLE * 40)
    engine.add("strict", list(range(300)), Request("tenant", tpot_ms=1.0))
    assert not any(engine.step()["loose"] for _ in range(20))
    engine.end("strict")
    assert any(engine.step()["loose"] for _ in range(5))


def test_other_tenants_answers_are_not_drafted() -> None:
    text = list(range(100, 200))
    for tenant, drafted in (("a", True), ("b", False), (None, False)):
        engine = Engine({"suffix": RecentOutputs(SLOTS, 1 << 17)})
        engine.add("first", text, Request("a"))
        for _ in range(60):
            engine.step()
        engine.end("first")
        engine.add("second", text, Request(tenant))
        assert any(engine.step()["second"] for _ in range(30)) == drafted


def test_a_name_that_comes_again_is_another_request() -> None:
    engine = Engine({"ngram": PromptLookup(SLOTS, 64)})
    engine.add("one", CYCLE * 40)
    for _ in range(20):
        engine.step()
    engine.end("one")
    engine.add("one", list(range(300)))
    assert not any(engine.step()["one"] for _ in range(20))


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_whatever_comes_goes_and_is_held_back_every_draft_is_its_requests_own(seed: int) -> None:
    """Texts have letters of their own, so that a draft of another request would show."""
    rng = random.Random(seed)
    engine, names = Engine(), 0
    letters: dict[str, set[int]] = {}
    for _ in range(60):
        if len(engine.texts) < 3 * SLOTS and rng.random() < 0.4:
            name, names = f"request {names}", names + 1
            own = [100 * names + i for i in range(3)]
            letters[name] = set(own)
            engine.add(name, [rng.choice(own) for _ in range(LENGTH - 5)], Request(name))
        if engine.texts and rng.random() < 0.2:
            engine.end(rng.choice(list(engine.texts)))
        ready = rng.sample(list(engine.texts), min(len(engine.texts), rng.randrange(1, SLOTS + 1)))
        if not ready:
            continue
        for name, draft in engine.step(ready).items():
            assert set(draft) <= letters[name]
            assert len(draft) <= MOST
