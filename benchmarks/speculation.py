"""Claim: on the whole faster than vLLM's own text-driven drafts, and never slower than none.

SmolLM2 on this machine's CPU, greedy, batches of 1 to 48 requests that start together. Each round
starts vLLM anew for every system, one after the other, with the same requests. Answers have to be
the same throughout. ``suffix`` needs a Python with vLLM and arctic-inference. With ``--draft`` a
model cut from SmolLM2's first layers drafts instead, by vLLM to each fixed length, and as far as we
say:

    python -m benchmarks.speculation --quick
    python -m benchmarks.speculation --rounds 3 --suffix-python /path/to/other/venv/bin/python
    python -m benchmarks.speculation --rounds 3 --draft 24
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lab.early_exit import prepare_early_exit
from benchmarks.lab.machine import OthersMeter
from benchmarks.lab.model import ROOT, prepare_smollm2
from benchmarks.lab.server import cpu_environment
from benchmarks.lab.workload import TASKS

BATCHES, QUICK_BATCHES = (1, 4, 16, 48), (1, 4)
TOKENS, QUICK_TOKENS = 128, 32
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        }
    },
    "suffix": {"speculative_config": {"method": "suffix", "num_speculative_tokens": 16}},
    "ours": {},
}
MOST_DRAFTED = 6
FIXED = {f"draft {k}": k for k in range(1, MOST_DRAFTED + 1)}
LEAST_OF_BETTER, LEAST_OF_CELL, LEAST_OF_NONE, LEAST_OF_FIXED = 1.1, 0.97, 0.98, 0.97
Cell = tuple[str, int]
Measured = Mapping[str, Mapping[Cell, Sequence[float]]]


def options_of(system: str, draft: int | None) -> Mapping[str, Any]:
    """What vLLM is started with; ``draft`` is how many layers the drafting model has."""
    if draft is None or system == "none":
        return SYSTEMS[system]
    return {
        "speculative_config": {
            "method": "draft_model",
            "model": str(prepare_early_exit(draft)),
            "num_speculative_tokens": FIXED.get(system, MOST_DRAFTED),
        }
    }


def child(system: str, quick: bool, draft: int | None) -> None:
    """Measures one system; prints a line of JSON."""
    from vllm import LLM, SamplingParams

    tokens, found = QUICK_TOKENS if quick else TOKENS, []
    llm = LLM(
        str(prepare_smollm2()),
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=max(BATCHES),
        dtype="float32",
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options_of(system, draft),
    )
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def answer(prompts: Sequence[str]) -> tuple[float, float, list[str]]:
        """Seconds for all, median TPOT in ms, and texts."""
        chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
        start_s = time.monotonic()
        answers: Any = llm.chat(chats, params, use_tqdm=False)
        took_s = time.monotonic() - start_s
        times = [one.metrics for one in answers]
        after_first_s = statistics.median(t.last_token_ts - t.first_token_ts for t in times)
        texts = [one.outputs[0].text for one in answers]
        return took_s, after_first_s / (tokens - 1) * 1e3, texts

    answer(["Count to one hundred."])
    for workload in TASKS:
        for batch in QUICK_BATCHES if quick else BATCHES:
            rng = random.Random(f"{workload.__name__} {batch}")
            took_s, tpot_ms, texts = answer([workload(rng) for _ in range(batch)])
            found.append([workload.__name__, batch, batch * tokens / took_s, tpot_ms, texts])
    counts = {one.name: one for one in llm.get_metrics()}
    drafts: Any = counts.get("vllm:spec_decode_num_drafts")
    right: Any = counts.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    survival = [one / drafts.value for one in right.values] if drafts and drafts.value else []
    print(json.dumps({"cells": found, "survival": survival}), flush=True)


def measured(system: str, quick: bool, python: str, draft: int | None) -> dict[str, Any]:
    """One start of one system, in a process of its own."""
    env = {**cpu_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env.pop("XLLM_PLUGINS", None)
    # Arctic's library brings a plugin of its own that is not measured here.
    env["VLLM_PLUGINS"] = "xllm"
    if system == "ours":
        mode = "on" if draft else "auto"
        env |= {"XLLM_PLUGINS": "xllm.spec_decode", "XLLM_SPEC_DECODE_MODE": mode}
    command = [python, "-m", "benchmarks.speculation", "--child", system]
    command += ["--draft", str(draft)] if draft else []
    ran = subprocess.run(
        command + ["--quick"] * quick,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def claims(rates: Measured) -> dict[str, bool]:
    """What is wanted of tokens per second, with the ratio that was found, and whether it holds."""
    fixed = [system for system in rates if system not in ("none", "ours")]
    found: dict[str, bool] = {}
    if "ours" not in rates:
        return found
    if fixed:
        against = {system: _ratios(rates, [system]) for system in fixed}
        least = LEAST_OF_BETTER if "ngram" in fixed else LEAST_OF_FIXED
        means = {one: statistics.geometric_mean(cells.values()) for one, cells in against.items()}
        closest = min(means, key=means.__getitem__)
        name = f"{means[closest]:.3f} of {closest}, the best of the others on the geometric mean"
        found[f"ours is {name}, at least {least}"] = means[closest] >= least
        if "ngram" in fixed:
            found |= _everywhere(
                _ratios(rates, fixed), f"the better of {' and '.join(fixed)}", LEAST_OF_CELL
            )
    if "none" in rates and (not fixed or "ngram" in fixed):
        found |= _everywhere(_ratios(rates, ["none"]), "none", LEAST_OF_NONE)
    return found


def _ratios(rates: Measured, others: Sequence[str]) -> dict[Cell, float]:
    """Ours to the best of the others in every cell, medians of rounds."""
    return {
        cell: statistics.median(ours)
        / max(statistics.median(rates[system][cell]) for system in others)
        for cell, ours in rates["ours"].items()
    }


def _everywhere(ratios: Mapping[Cell, float], others: str, least: float) -> dict[str, bool]:
    worst, few = min(ratios, key=ratios.__getitem__), sum(one < least for one in ratios.values())
    mean = statistics.geometric_mean(ratios.values())
    claim = (
        f"ours is at least {least} of {others} in every cell: {mean:.3f} (geometric mean), at "
        f"worst {ratios[worst]:.3f} ({worst[0]}, batch {worst[1]}), less in {few} of {len(ratios)}"
    )
    return {claim: not few}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; status 1 where answers differ or a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two batch sizes and short answers")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS, *FIXED])
    parser.add_argument("--draft", type=int, help="layers of a drafting model cut from SmolLM2")
    parser.add_argument("--suffix-python", help="a Python whose vLLM finds arctic-inference")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "speculation.json")
    parser.add_argument("--child", choices=[*SYSTEMS, *FIXED], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child, args.quick, args.draft)
        return 0
    if args.draft is not None:
        prepare_early_exit(args.draft)
    default = ["none", *FIXED, "ours"] if args.draft else ["none", "ngram", "ours"]
    systems = list(args.systems or default)
    if args.suffix_python and "suffix" not in systems:
        systems.insert(-1, "suffix")
    others = OthersMeter()
    rates: dict[str, dict[Cell, list[float]]] = {}
    tpots: dict[str, dict[Cell, list[float]]] = {}
    answers: dict[Cell, list[str]] = {}
    survival: dict[str, list[float]] = {}
    differing = set()
    for _ in range(args.rounds):
        for system in systems:
            python = (args.suffix_python if system == "suffix" else None) or sys.executable
            found = measured(system, args.quick, python, args.draft)
            survival[system] = found["survival"]
            for workload, batch, rate, tpot_ms, texts in found["cells"]:
                cell = (workload, batch)
                rates.setdefault(system, {}).setdefault(cell, []).append(rate)
                tpots.setdefault(system, {}).setdefault(cell, []).append(tpot_ms)
                if answers.setdefault(cell, texts) != texts:
                    differing.add((system, cell))
    table = Table("workload", "batch", *(f"{system}, tok/s" for system in systems), "TPOT, ms")
    table.add_column("answers")
    for cell in answers:
        row = [f"{statistics.median(rates[system][cell]):.0f}" for system in systems]
        row.append(" ".join(f"{statistics.median(tpots[system][cell]):.0f}" for system in systems))
        different = [system for system in systems if (system, cell) in differing]
        row.append(f"{', '.join(different)} differ" if different else "same")
        table.add_row(cell[0], str(cell[1]), *row)
    console = Console(width=140)
    console.print(table)
    console.print(f"CPU time that others took: {others.share():.0%}")
    held = claims(rates)
    for claim, holds in held.items():
        console.print(f"{'met' if holds else 'NOT met'}: {claim}")
    saved = {f"{s} {w} {b}": got for s, cells in rates.items() for (w, b), got in cells.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"tokens_s": saved, "survival": survival}, indent=1))
    return 1 if differing or not all(held.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
