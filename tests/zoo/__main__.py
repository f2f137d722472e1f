"""Every family's answers with all features on against those with none: the table in docs/models.md.

    make zoo ARGS="Qwen3 'Llama 2'"

Families that are named are tried, else all; their rows are written anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab.model import ROOT
from benchmarks.lab.server import cpu_environment
from tests.zoo.families import FAMILIES, Family, written

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by `make zoo` -->", "<!-- end -->"
TITLES = (
    "| family | stands for | answers as without us | prompt tokens cached "
    "| of these from host memory | drafted tokens |"
)
SETTINGS = {
    "scheduler": {"mode": "on"},
    "kv": {"mode": "on", "host_gib": 0.05},
    "spec_decode": {"mode": "on"},
}
COUNTS = {
    "prefix": "vllm:prompt_tokens_cached",
    "fetched": "vllm:external_prefix_cache_hits",
    "drafted": "vllm:spec_decode_num_draft_tokens",
}


@dataclass(frozen=True)
class Found:
    """What came of a family.

    Attributes:
        answers: how many there were.
        wrong: how many of them were not those without us; 1 if it ran without us alone.
        active: features that were.
        counts: what they did, see ``COUNTS``.
        failure: why it did not run; empty if it did.
    """

    answers: int = 0
    wrong: int = 0
    active: Sequence[str] = ()
    counts: Mapping[str, int] | None = None
    failure: str = ""


def tried(family: Family, folder: Path) -> Found:
    """Ask the same without us and with everything on."""
    model = written(family, folder)
    # Models with images import torchvision, of which there is no build beside torch for CPUs.
    stub = {"PYTHONPATH": str(ROOT / "tests" / "ascend" / "stub")} if family.images else {}
    try:
        plain = asked(model, stub)
    except subprocess.CalledProcessError as error:
        return Found(failure=f"nor does vLLM alone run it on a CPU: {_reason(error)}")
    try:
        ours = asked(model, {**stub, "XLLM_PLUGINS": "xllm"})
    except subprocess.CalledProcessError as error:
        return Found(failure=f"vLLM alone runs it, with us not: {_reason(error)}", wrong=1)
    pairs = list(zip(plain["said"], ours["said"], strict=True))
    counts = {name: int(ours["metrics"].get(metric, 0)) for name, metric in COUNTS.items()}
    wrong = sum(one != other for one, other in pairs)
    return Found(len(pairs), wrong, ours["active"], counts)


def asked(model: Path, more: Mapping[str, str]) -> dict[str, Any]:
    """The JSON that a process prints which serves the model.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    plain = {k: v for k, v in cpu_environment().items() if not k.startswith("XLLM_")}
    env = {**plain, "VLLM_CPU_KVCACHE_SPACE": "1", **more}
    if "XLLM_PLUGINS" in more:
        env["XLLM_CONFIG"] = json.dumps(SETTINGS)
    command = [sys.executable, "-m", "tests.zoo.answers", str(model)]
    ran = subprocess.run(command, env=env, check=True, capture_output=True, text=True, cwd=ROOT)
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith('{"said"'))
    made: dict[str, Any] = json.loads(line)
    return made


def _reason(failed: subprocess.CalledProcessError) -> str:
    """The first error that a process of it logged; those behind it follow from it."""
    logged = [line for line in failed.stdout.splitlines() if " ERROR " in line]
    lines = [line.rpartition("] ")[2].strip() for line in (*logged, *failed.stderr.splitlines())]
    return next((line for line in lines if "Error: " in line), "it said nothing")


def row(family: Family, found: Found) -> str:
    """A line of the table."""
    first = f"| {family.name} | {family.stands_for} |"
    if found.failure or found.counts is None:
        return f"{first} {found.failure} | | | |"
    counts = found.counts
    same = f"{found.answers - found.wrong} of {found.answers}"
    off = sorted(set(SETTINGS) - set(found.active))
    note = f"; without {', '.join(off)}" if off else ""
    return (
        f"{first} {same}{note} | {counts['prefix']} | {counts['fetched']} | {counts['drafted']} |"
    )


def main() -> int:
    """Try, print, and write; status 1 if an answer differs, or none came with us alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="parts of their names; all if none")
    wanted = parser.parse_args().families
    chosen = [f for f in FAMILIES if not wanted or any(part in f.name for part in wanted)]
    head, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, tail = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line[:2] == "| "}
    good = True
    with tempfile.TemporaryDirectory(prefix="xllm-zoo-") as folder:
        for family in chosen:
            found = tried(family, Path(folder))
            rows[family.name] = row(family, found)
            good = good and not found.wrong
            print(rows[family.name], flush=True)
    there = [rows[family.name] for family in FAMILIES if family.name in rows]
    made = [BEGIN, "", TITLES, "|---|---|---|---|---|---|", *there, "", END]
    PAGE.write_text(head + "\n".join(made) + tail)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
