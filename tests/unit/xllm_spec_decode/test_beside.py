"""A drafting model beside texts: it drafts where they do not, and each request has the better."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from xllm_plugins.compat.spec_beside import NO_PASS
from xllm_spec_decode.acceptance import Best
from xllm_spec_decode.beside import ModelBeside
from xllm_spec_decode.drafters import AGREED, ALONE, DISPUTED, Drafts, PromptLookup
from xllm_spec_decode.slots import Request
from xllm_spec_decode.speculator import Speculator, Step
from xllm_spec_decode.width import passes

MOST, SLOTS, LENGTH = 4, 4, 2000
CYCLE = [11, 12, 13, 14, 15]
BASE_MS, TOKEN_MS = 20.0, 0.5


class Engine:
    """Requests that say what their texts say; a model that knows them, as often as it is right."""

    def __init__(self, right: float, pass_ms: float) -> None:
        self.right, self.pass_ms = right, pass_ms
        self._rng = np.random.default_rng(0)
        drafters = {"ngram": PromptLookup(SLOTS, 1024)}
        self.speculator = Speculator(drafters, SLOTS, MOST, model="model")
        self._texts = np.zeros((SLOTS, LENGTH), np.int32)
        self._said: list[int] = []
        self._drafts: list[list[int]] = []
        self._new: dict[str, Request] = {}
        self._drafting_ms = 0.0
        self.now_s = 0.0
        self.widths = Counter[int]()

    def add(self, text: list[int], request: Request | None = None, row: int | None = None) -> None:
        """One more request; with ``row`` in the place of one that has ended."""
        if row is None:
            row = len(self._said)
            self._said.append(3)
            self._drafts.append([])
        self._texts[row, : len(text)] = text
        self._said[row], self._drafts[row] = 3, []
        self._new[str(row)] = request or Request(None)

    def step(self) -> None:
        n = len(self._said)
        drafted = {str(i): len(draft) for i, draft in enumerate(self._drafts) if draft}
        said = []
        for i, draft in enumerate(self._drafts):
            begin, right = self._said[i], 0
            while right < len(draft) and draft[right] == self._texts[i, begin + right]:
                right += 1
            said.append(self._texts[i, begin : begin + right + 1].tolist())
            self._said[i] += right + 1
        verified = sum(drafted.values())
        self.now_s += (BASE_MS + TOKEN_MS * (n + verified) + self._drafting_ms) / 1e3
        step = Step([str(i) for i in range(n)], self._new, (), drafted, n + verified, np.full(n, 3))
        self._new = {}
        lengths = np.array(self._said)
        width = self.speculator.begin(step, said, lengths, self._texts, self.now_s)
        self.widths[width] += 1
        self._drafting_ms = self.pass_ms * passes(width)
        if width == NO_PASS:
            self._drafts = self.speculator.finish()
            return
        places = lengths[:, None] + np.arange(width)
        wrong = self._rng.random(places.shape) >= self.right
        modelled = self._texts[np.arange(n)[:, None], places] + wrong.astype(np.int32)
        self._drafts = self.speculator.finish(modelled)

    def run(self, steps: int) -> Counter[int]:
        """How often the model drafted each length."""
        self.widths.clear()
        for _ in range(steps):
            self.step()
        return self.widths


def novel(seed: int) -> list[int]:
    """A text in which nothing comes twice."""
    return [int(token) for token in np.random.default_rng(seed).permutation(1_000_000)[:LENGTH]]


def test_where_texts_say_it_all_the_model_does_not_draft() -> None:
    engine = Engine(right=0.9, pass_ms=3.0)
    engine.add(CYCLE * (LENGTH // 5))
    engine.run(60)
    before = engine.speculator.facts()["accepted"]
    found = engine.run(128)
    assert found[0] + found[NO_PASS] >= 120
    after = engine.speculator.facts()["accepted"]
    assert after["ngram"] - before["ngram"] > 3 * 120
    assert after["model"] - before["model"] < 16


def test_where_texts_say_nothing_the_model_drafts() -> None:
    engine = Engine(right=0.9, pass_ms=1.0)
    engine.add(novel(1))
    engine.run(60)
    assert sum(many for width, many in engine.run(128).items() if width >= 2) >= 120
    assert engine.speculator.facts()["accepted"]["model"] > 2 * 120


def test_a_model_that_costs_more_than_it_brings_rests() -> None:
    engine = Engine(right=0.3, pass_ms=15.0)
    engine.add(novel(1))
    engine.run(100)
    assert engine.run(500) == {NO_PASS: 500}


def test_after_its_rest_a_model_drafts_for_new_requests_if_that_pays_now() -> None:
    engine = Engine(right=0.3, pass_ms=15.0)
    engine.add(novel(1))
    engine.run(100)
    engine.right, engine.pass_ms = 0.95, 1.0
    found = Counter[int]()
    for number in range(15):
        engine.add(novel(number), row=0)
        found += engine.run(350)
    assert 4000 < found[NO_PASS] < 4400  # whoever was there when the rest ended has gaps
    assert sum(many for width, many in found.items() if width >= 2) > 500


def test_after_a_rest_who_finds_kv_cached_is_not_drafted_for() -> None:
    engine = Engine(right=0.3, pass_ms=15.0)
    engine.add(novel(1))
    engine.run(100)
    engine.right, engine.pass_ms = 0.95, 1.0
    for number in range(13):
        engine.add(novel(number), row=0)
        engine.run(350)
    engine.add(novel(20), Request(None, cached_tokens=2), row=0)
    assert engine.run(200) == {NO_PASS: 200}
    engine.add(novel(21), row=0)
    assert engine.run(200)[NO_PASS] == 0


def test_the_step_after_a_prompt_tells_nothing_about_a_models_time() -> None:
    speculator = Speculator({"ngram": PromptLookup(SLOTS, 64)}, SLOTS, MOST, model="model")
    tokens, prompts = np.zeros((1, 64), np.int32), np.full(1, 3)
    for number in range(40):  # every second step computes some of another one's prompt
        step = Step(["0"], {}, (), {}, 1 + 7 * (number % 2), prompts)
        speculator.begin(step, [[0]], np.full(1, 4 + number), tokens, 0.01 * number)
        speculator.finish()
    assert not speculator.facts()["step_ms"]["ready"]


def test_side_by_side_each_request_has_the_better_draft() -> None:
    engine = Engine(right=0.8, pass_ms=0.5)
    engine.add(CYCLE * (LENGTH // 5))
    engine.add(novel(1))
    engine.run(60)
    assert engine.run(128)[0] < 16
    drafts = engine.speculator.facts()["drafts"]
    assert min(drafts["ngram"], drafts["model"]) > 100


def test_a_tpot_too_short_for_the_models_passes_has_none() -> None:
    engine = Engine(right=0.9, pass_ms=5.0)
    engine.add(novel(1), Request(None, tpot_ms=BASE_MS + 2.0))
    engine.run(60)
    assert set(engine.run(128)) <= {0, NO_PASS}


def test_what_a_pass_takes_is_told_from_what_a_token_takes() -> None:
    engine = Engine(right=0.6, pass_ms=3.0)
    engine.add(novel(1))
    engine.add(CYCLE * (LENGTH // 5))
    engine.run(400)
    found = engine.speculator.facts()["step_ms"]
    assert found["pass"] + 2 * found["pass_request"] == pytest.approx(3.0, rel=0.1)
    assert found["drafted_token"] == pytest.approx(TOKEN_MS, rel=0.2)


def test_a_step_that_says_nothing_has_no_drafts() -> None:
    speculator = Speculator({"ngram": PromptLookup(SLOTS, 64)}, SLOTS, MOST, model="model")
    tokens, ones = np.zeros((1, 64), np.int32), np.full(1, 3)
    step = Step(["0"], {"0": Request(None)}, (), {}, 3, ones)
    assert speculator.begin(step, [[]], ones, tokens, 0.0) == 0
    assert speculator.finish(np.zeros((1, 0), np.int32)) == [[]]


def test_texts_vote_on_the_models_tokens_as_far_as_they_went_on_alike() -> None:
    texts, drafts = Best.empty(3, MOST), Drafts.empty(3, MOST)
    texts.tokens[0], texts.survival[0] = [1, 2, 9, 4], 0.5
    texts.tokens[1], texts.survival[1, :2] = [1, 2, 0, 0], 0.5
    modelled = np.tile(np.arange(1, MOST + 1, dtype=np.int32), (3, 1))
    ModelBeside(SLOTS, MOST).compare(np.arange(3), modelled, texts, drafts)
    assert drafts.votes.tolist() == [
        [AGREED, AGREED, DISPUTED, ALONE],
        [AGREED, AGREED, ALONE, ALONE],
        [ALONE] * 4,
    ]
    assert drafts.lengths.tolist() == [MOST] * 3
