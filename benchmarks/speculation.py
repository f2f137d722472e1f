"""Claim: as fast as the better of vLLM's own text-driven drafts, and never slower than none.

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
WORDS = ("river", "stone", "cloud", "bridge", "window", "garden", "letter", "market", "winter")


def code_editing(rng: random.Random) -> str:
    """A file to be given back with one name changed."""
    names = rng.sample(WORDS, 4)
    file = "\n".join(f"def {n}(width, height):\n    return width * height\n" for n in names)
    return f"Rename {names[0]} to area in this file and print the whole file:\n\n{file}"


def summarising(rng: random.Random) -> str:
    """A text to be summarised."""
    text = " ".join(
        f"The {rng.choice(WORDS)} near the {rng.choice(WORDS)} is old." for _ in range(20)
    )
    return f"Summarise in two sentences:\n\n{text}"


def open_chat(rng: random.Random) -> str:
    """A story to be told."""
    return f"Tell me a story about a {rng.choice(WORDS)} and a {rng.choice(WORDS)}."


def extraction(rng: random.Random) -> str:
    """One schema to be filled from a sentence."""
    return (
        'Answer with JSON like {"name": "", "city": "", "age": 0} only. Text: '
        f"{rng.choice(WORDS).title()} is {rng.randrange(20, 80)} and lives in {rng.choice(WORDS)}."
    )


def agent_loop(rng: random.Random) -> str:
    """A tool's output that repeats, to be repeated."""
    lines = "\n".join(f"-rw-r--r-- root {rng.choice(WORDS)}.txt" for _ in range(12))
    return f"$ ls\n{lines}\n$ ls\n{lines}\nList the files again, in the same form."


WORKLOADS = (code_editing, summarising, open_chat, extraction, agent_loop)
Cell = tuple[str, int]


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

    def answer(prompts: Sequence[str]) -> tuple[float, list[str]]:
        chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
        start_s = time.monotonic()
        answers = llm.chat(chats, params, use_tqdm=False)
        return time.monotonic() - start_s, [one.outputs[0].text for one in answers]

    answer(["Count to one hundred."])
    for workload in WORKLOADS:
        for batch in QUICK_BATCHES if quick else BATCHES:
            rng = random.Random(f"{workload.__name__} {batch}")
            took_s, texts = answer([workload(rng) for _ in range(batch)])
            found.append([workload.__name__, batch, batch * tokens / took_s, texts])
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and saves; status 1 where answers differ."""
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
    rates: dict[tuple[str, Cell], list[float]] = {}
    answers: dict[Cell, list[str]] = {}
    survival: dict[str, list[float]] = {}
    differing = set()
    for _ in range(args.rounds):
        for system in systems:
            python = (args.suffix_python if system == "suffix" else None) or sys.executable
            found = measured(system, args.quick, python, args.draft)
            survival[system] = found["survival"]
            for workload, batch, rate, texts in found["cells"]:
                cell = (workload, batch)
                rates.setdefault((system, cell), []).append(rate)
                if answers.setdefault(cell, texts) != texts:
                    differing.add((system, cell))
    table = Table("workload", "batch", *(f"{system}, tok/s" for system in systems), "answers")
    for cell in answers:
        row = [f"{statistics.median(rates[system, cell]):.0f}" for system in systems]
        same = [system for system in systems if (system, cell) in differing]
        table.add_row(cell[0], str(cell[1]), *row, f"{', '.join(same)} differ" if same else "same")
    Console(width=120).print(table)
    Console().print(f"CPU time that others took: {others.share():.0%}")
    saved = {f"{s} {w} {b}": values for (s, (w, b)), values in rates.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"tokens_s": saved, "survival": survival}, indent=1))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
