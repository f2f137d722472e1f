"""One length for all: what yields the most tokens per millisecond, learned while it is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from xllm_spec_decode.width import BatchWidth, Drafted

MOST = 5
Times = Callable[[int, int, int], float]


def small_drafter(requests: int, verified: int, width: int) -> float:
    """A step of a device that is busy with 64 tokens: drafting takes a tenth of a step a pass."""
    passes = max(1, width)
    return 10.0 + 0.16 * (requests + verified) + 1.0 * passes + 0.01 * passes * requests


def yielded(requests: int, width: int, right: float, times: Times) -> float:
    tokens = sum(right**k for k in range(width + 1))
    return tokens / times(requests, requests * width, width)


def course(
    policy: BatchWidth, requests: int, right: float, steps: int, times: Times = small_drafter,
    budget_ms: float = math.inf,
) -> Counter[int]:  # fmt: skip
    """How often each length is chosen; each drafted token is right with the chance ``right``."""
    rng, chosen, verified = np.random.default_rng(0), Counter[int](), 0
    for _ in range(steps):
        width = policy.choose(requests, budget_ms)
        drafts = np.full(requests if verified else 0, verified, np.int64)
        accepted = np.minimum(rng.geometric(1.0 - right, len(drafts)) - 1, verified)
        took_ms = times(requests, requests * verified, width)
        policy.observe(Drafted(requests, drafts, accepted, width, 100 * requests, took_ms))
        chosen[width] += 1
        verified = width
    return chosen


@pytest.mark.parametrize("requests", [1, 8, 64, 256])
@pytest.mark.parametrize("right", [0.2, 0.6, 0.9])
def test_the_length_becomes_the_one_that_yields_most(requests: int, right: float) -> None:
    policy = BatchWidth(MOST)
    course(policy, requests, right, 100)
    ((found, often),) = course(policy, requests, right, 200).most_common(1)
    best = max(yielded(requests, k, right, small_drafter) for k in range(MOST + 1))
    assert yielded(requests, found, right, small_drafter) >= 0.97 * best
    assert often > 150


def test_a_large_batch_and_a_poor_drafter_have_no_drafts() -> None:
    small, large = (course(BatchWidth(MOST), n, 0.6, 400) for n in (1, 256))
    assert small.most_common(1)[0][0] > 0
    assert large.most_common(1)[0][0] == 0
    poor = BatchWidth(MOST)  # whose first token costs only what verifying it does
    course(poor, 1, 0.01, 400)
    assert course(poor, 1, 0.01, 400).most_common(1)[0][0] == 0


def test_a_drafter_that_has_become_good_is_noticed_though_nothing_is_drafted() -> None:
    policy = BatchWidth(MOST)
    course(policy, 4, 0.05, 400)
    assert course(policy, 4, 0.95, 4000).most_common(1)[0][0] > 0


def test_trying_others_is_bounded() -> None:
    policy = BatchWidth(MOST)
    course(policy, 4, 0.8, 200)
    found = course(policy, 4, 0.8, 640)
    assert 640 - max(found.values()) <= 640 // 64 + 10


def test_steps_keep_a_budget_but_for_those_that_were_to_learn_from() -> None:
    policy = BatchWidth(MOST)
    course(policy, 4, 0.9, 50)
    budget_ms = small_drafter(4, 8, 2) + 0.1
    found = course(policy, 4, 0.9, 300, budget_ms=budget_ms)
    assert max(found) == 2
    assert course(policy, 4, 0.9, 10, budget_ms=1.0) == {0: 10}


def test_chances_are_those_of_each_place_once_the_ones_before_were_right() -> None:
    policy = BatchWidth(3)
    both = np.array([2, 2] * 500)
    accepted = np.array([2, 0] * 500)  # of first tokens a half is right, of second ones all
    policy.observe(Drafted(1000, both, accepted, 2, None, None))
    first, second, unseen = policy.chances()
    assert first == pytest.approx(0.5, abs=0.02)
    assert second > 0.97
    assert unseen == pytest.approx(second)


def test_steps_with_prompts_tell_nothing_about_time() -> None:
    policy = BatchWidth(MOST)
    none = np.zeros(0, np.int64)
    for _ in range(50):
        policy.observe(Drafted(4, none, none, 1, None, 500.0))
        policy.observe(Drafted(4, none, none, 1, 400, None))
    assert not policy.step_facts()["ready"]
