"""Claim: on H200s drafts collapse at no batch size, whatever the drafter is worth.

Not slower than without drafts or with fewer requests, by more than 2 %, nor than the best fixed
length, by more than 3 %.

Steady decoding of Qwen3-8B on one H200 and of DeepSeek-V3 on eight, by the shipped profiles of
their steps, with drafts from texts, which cost no time of the device. The proposer is the real one
with what it learns of acceptance and step times; texts, and which of a draft's tokens are right,
are drawn. No requests come or go, so that the simulator's engine has nothing to do here. A step's
tokens, drafted ones among them, take what decodes take, or what the tokens of a prompt do where
that is more; the expert weights that they need are read.

The chance of a token, once those before it were right, is 0.85 (the least that DeepSeek-V3's report
gives for the second token, arXiv 2412.19437), 0.6 or 0.3; or what a run of
``benchmarks.speculation`` has measured:

    python -m benchmarks.speculation_sim
    python -m benchmarks.speculation_sim --survival .cache/speculation.json --system "draft 6"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.lab.model import ROOT
from xllm_plugins.latency import StepShape
from xllm_scheduler.simulate.profiles import Profile, find_profile
from xllm_spec_decode.drafters import Drafter, Drafts, Rows, Tokens
from xllm_spec_decode.slots import Request
from xllm_spec_decode.speculator import Speculator, Step

MODELS = (("Qwen3-8B", 1), ("DeepSeek-V3", 8))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FIXED = (1, 2, 4, 8)
CHANCES = (0.85, 0.6, 0.3)
MOST, PROMPT = 8, 1000
STEPS, WARM = 400, 150
REQUESTS = 16  # that a rate is the mean of, at least
LEAST_OF_NONE, LEAST_OF_BEST, LEAST_OF_SMALLER = 0.98, 0.97, 0.98
_RIGHT_MATCH = 8  # tokens that the drafter says agree; it is always right about them


class Scripted(Drafter):
    """Knows how texts go on, and is wrong as often as it is told to be.

    Args:
        texts: ``[n, any]``.
        chances: of each token of a draft once those before were right, ``[MOST]``.
        rng: draws which are.
    """

    def __init__(self, texts: Tokens, chances: Sequence[float], rng: np.random.Generator) -> None:
        self._texts, self._chances, self._rng = texts, np.array(chances), rng

    def learn(self, rows: Rows) -> None:  # noqa: D102
        pass

    def forget(self, slot: int) -> None:  # noqa: D102
        pass

    def draft(self, rows: Rows, drafts: Drafts) -> None:  # noqa: D102
        n = len(rows.rows)
        places = rows.lengths[:, None] + np.arange(MOST)
        wrong = self._rng.random((n, MOST)) >= self._chances
        drafts.tokens[:] = self._texts[rows.rows[:, None], places] + wrong
        drafts.lengths[:], drafts.matches[:] = MOST, _RIGHT_MATCH


def step_ms(profile: Profile, requests: int, drafted: int, context_tokens: int) -> float:
    """How long a step takes that verifies so many drafted tokens."""
    tokens, time = requests + drafted, profile.step_time
    read_ms = time.context * context_tokens
    decodes_ms = profile.step_ms(StepShape(decodes=tokens)) + read_ms
    chunk_ms = profile.step_ms(StepShape(prefill_tokens=tokens)) + read_ms
    return max(decodes_ms, chunk_ms)


def fixed_rate(profile: Profile, requests: int, length: int, chances: Sequence[float]) -> float:
    """Tokens per second with drafts of one length, expected."""
    each = 1.0 + float(np.cumprod(chances[:length]).sum())
    context = round(requests * (PROMPT + (WARM + STEPS / 2) * each))
    return 1e3 * requests * each / step_ms(profile, requests, requests * length, context)


class Course(NamedTuple):
    """What steady decoding yields with our proposer: tokens per second, and a draft's length."""

    tokens_s: float
    drafted: float


def our_course(profile: Profile, requests: int, chances: Sequence[float], seed: int) -> Course:
    """Our proposer over ``STEPS`` steps, after ``WARM`` ones in which it learns."""
    rng = np.random.default_rng(seed)
    room = PROMPT + (STEPS + WARM) * (MOST + 1) + MOST
    texts = rng.integers(0, 1 << 30, (requests, room), dtype=np.int32)
    speculator = Speculator(
        {"scripted": Scripted(texts, chances, rng)}, requests, MOST, profile.step_time.idle_experts
    )
    ids = [str(i) for i in range(requests)]
    new = {one: Request("tenant") for one in ids}
    lengths, prompts = np.full(requests, PROMPT), np.full(requests, PROMPT)
    drafts: list[list[int]] = [[] for _ in ids]
    now_ms = said_tokens = drafted_tokens = counted_ms = 0.0
    for number in range(WARM + STEPS):
        many = {one: len(draft) for one, draft in zip(ids, drafts, strict=True) if draft}
        drafted = sum(many.values())
        took_ms = step_ms(profile, requests, drafted, int(lengths.sum()))
        now_ms += took_ms
        said = [_verified(texts[i], lengths[i], draft) for i, draft in enumerate(drafts)]
        grown = np.array([len(one) for one in said])
        lengths = lengths + grown
        if number >= WARM:
            said_tokens += grown.sum()
            drafted_tokens += drafted
            counted_ms += took_ms
        step = Step(ids, new, (), many, requests + drafted, prompts)
        drafts = speculator.propose(step, said, lengths, texts, now_ms / 1e3)
        new = {}
    return Course(1e3 * said_tokens / counted_ms, drafted_tokens / STEPS / requests)


def _verified(text: Tokens, length: int, draft: Sequence[int]) -> list[int]:
    right = 0
    while right < len(draft) and draft[right] == text[length + right]:
        right += 1
    said: list[int] = text[length : length + right + 1].tolist()
    return said


def chances_of(path: Path, system: str) -> list[float]:
    """Chances out of what ``benchmarks.speculation`` saved; the last one holds for the rest."""
    survival = [1.0, *json.loads(path.read_text())["survival"][system]]
    chances = [b / a if a else 0.0 for a, b in pairwise(survival)][:MOST]
    return chances + [chances[-1]] * (MOST - len(chances))


def judged(
    name: str, chances: Sequence[float], profile: Profile
) -> tuple[Table, list[str], list[list[float]]]:
    """A table over batch sizes, where the claim fails, and all rates ``[batches, systems]``."""
    heads = ["none", *(f"K={k}" for k in FIXED), "ours"]
    table = Table("batch", *(f"{head}, tok/s" for head in heads), "ours drafts", title=name)
    rates: list[list[float]] = []
    failed = []
    for n in BATCHES:
        fixed = [fixed_rate(profile, n, k, chances) for k in (0, *FIXED)]
        courses = [our_course(profile, n, chances, seed) for seed in range(max(1, REQUESTS // n))]
        ours = Course(*np.mean(courses, axis=0).tolist())
        smaller = max((row[-1] for row in rates), default=0.0)
        for least, of in (
            (LEAST_OF_NONE, fixed[0]),
            (LEAST_OF_BEST, max(fixed)),
            (LEAST_OF_SMALLER, smaller),
        ):
            if ours.tokens_s < least * of:
                failed.append(f"{name}, batch {n}: {ours.tokens_s:,.0f} below {least} of {of:,.0f}")
        rates.append([*fixed, ours.tokens_s])
        table.add_row(str(n), *(f"{rate:,.0f}" for rate in rates[-1]), f"{ours.drafted:.1f}")
    return table, failed, rates


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes, prints and saves; status 1 where drafts collapse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--survival", type=Path, help="what benchmarks.speculation has saved")
    parser.add_argument("--system", default="ours", help="whose of it")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "speculation_sim.json")
    args = parser.parse_args(arguments)
    curves = {f"{chance} right": [chance] * MOST for chance in CHANCES}
    if args.survival:
        curves = {f"as {args.system}": chances_of(args.survival, args.system)}
    saved, failed = {}, []
    for model, gpus in MODELS:
        for label, chances in curves.items():
            profile = find_profile("h200", model, gpus)
            name = f"{model}, {label}"
            table, problems, rates = judged(name, chances, profile)
            Console(width=120).print(table)
            failed += problems
            saved[name] = rates
    for problem in failed:
        Console().print(f"missed: {problem}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"batches": BATCHES, "rates": saved}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
