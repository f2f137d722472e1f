"""Every family's answers with all features on against those with none: the table in docs/models.md.

    make zoo ARGS="Qwen3 'Llama 2'"

Families that are named are tried, else all. With all of them the table is written anew.
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
        same, answers: how many answers were those without us, of how many.
        active: features that were.
        counts: what they did, see ``COUNTS``.
        failure: the last line of what it said, if it failed.
    """

    same: int = 0
    answers: int = 0
    active: Sequence[str] = ()
    counts: Mapping[str, int] | None = None
    failure: str = ""


def tried(family: Family, folder: Path) -> Found:
    """Ask the same without us and with everything on."""
    model = written(family, folder)
    try:
        plain, ours = asked(model, {}), asked(model, {"XLLM_PLUGINS": "xllm"})
    except subprocess.CalledProcessError as error:
        return Found(failure=_reason(error.stderr))
    pairs = list(zip(plain["said"], ours["said"], strict=True))
    counts = {name: int(ours["metrics"].get(metric, 0)) for name, metric in COUNTS.items()}
    return Found(sum(one == other for one, other in pairs), len(pairs), ours["active"], counts)


def asked(model: Path, more: Mapping[str, str]) -> dict[str, Any]:
    """The JSON that a process prints which serves the model.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    plain = {k: v for k, v in cpu_environment().items() if not k.startswith("XLLM_")}
    env = {**plain, "VLLM_CPU_KVCACHE_SPACE": "1", **more}
    if more:
        env["XLLM_CONFIG"] = json.dumps(SETTINGS)
    command = [sys.executable, "-m", "tests.zoo.answers", str(model)]
    ran = subprocess.run(command, env=env, check=True, capture_output=True, text=True, cwd=ROOT)
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith('{"said"'))
    made: dict[str, Any] = json.loads(line)
    return made


def _reason(stderr: str) -> str:
    """The first error that names itself, which is the cause; those behind it follow from it."""
    lines = [line.rpartition("] ")[2].strip() for line in stderr.splitlines()]
    errors = [one for one in lines if "Error: " in one and "RuntimeError: Engine" not in one]
    return (errors or lines or ["it said nothing"])[0]


def row(family: Family, found: Found) -> str:
    """A line of the table."""
    first = f"| {family.name} | {family.stands_for} |"
    if found.failure or found.counts is None:
        return f"{first} does not run: {found.failure} | | | |"
    counts = found.counts
    same = f"{found.same} of {found.answers}"
    off = sorted(set(SETTINGS) - set(found.active))
    note = f"; without {', '.join(off)}" if off else ""
    return (
        f"{first} {same}{note} | {counts['prefix']} | {counts['fetched']} | {counts['drafted']} |"
    )


def main() -> int:
    """Try, print, and write; status 1 if an answer differs or a family does not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="parts of their names; all if none")
    wanted = parser.parse_args().families
    chosen = [f for f in FAMILIES if not wanted or any(part in f.name for part in wanted)]
    rows, good = [], True
    with tempfile.TemporaryDirectory(prefix="xllm-zoo-") as folder:
        for family in chosen:
            found = tried(family, Path(folder))
            rows.append(row(family, found))
            good = good and not found.failure and found.same == found.answers
            print(rows[-1], flush=True)
    if not wanted:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        table = [BEGIN, "", TITLES, "|---|---|---|---|---|---|", *rows, "", END]
        made = head + "\n".join(table) + rest.partition(END)[2]
        PAGE.write_text(made)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
