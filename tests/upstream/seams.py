"""Holds seams of ``xllm_plugins.compat`` against another vLLM: ``make seams VERSION=0.33.0``.

    python -m tests.upstream.seams 0.33.0

prints a row for each seam, keeps it in ``seams.json``, and puts the table of all that is kept into
``docs/compatibility.md``. What is looked at lies in ``.cache``, where ``.ci/setup-vllm`` and
``.ci/setup-ascend`` put it, and is imported in a child process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from xllm_plugins.compat import (
    ASCEND,
    NIXL,
    SEAMS,
    load_seam,
    missing,
    targets_here,
    upstream_of,
    vllm_version,
)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("seams.json")
PAGE = ROOT / "docs" / "compatibility.md"
LISTED = [seam for seam in SEAMS if upstream_of(seam) != NIXL]  # the others have no vLLM's version
BEGIN, END = "<!-- made by make seams -->", "<!-- end of what make seams made -->"


class Found(Enum):
    """What looking at a seam gave."""

    THERE = "there"  # all that it relies on, by names and parameters
    GONE = "gone"
    UNKNOWN = "unknown"  # a module of it cannot be imported with what is installed here


Rows = dict[str, tuple[Found, str]]
"""By seam, what was found, and why it is not there."""


def main() -> int:
    """Look at one version, keep it, and return the exit status."""
    version = sys.argv[1]
    if len(sys.argv) > 2:
        print(json.dumps({seam: look(seam) for seam in sys.argv[2:]}, default=lambda e: e.value))
        return 0
    kept = read()
    kept[version] = found = seen(version)
    write(kept)
    broken = [seam for seam in found if cell(seam, version, kept) == "broken"]
    for seam, (_, why) in found.items():
        print(f"{seam:<17} {cell(seam, version, kept):<8} {why}".rstrip())
        if cell(seam, version, kept) != "holds":
            print(f"{'':<17} {'':<8} instead: {load_seam(seam).WITHOUT}")
    return 1 if broken else 0


def seen(version: str) -> Rows:
    """What a child process finds of each seam that one version of vLLM has."""
    vllm, ascend = (ROOT / ".cache" / f"{name}-{version}" for name in ("vllm", "vllm-ascend"))
    if not vllm.is_dir():
        sys.exit(f"{vllm} is missing; .ci/setup-vllm {version} makes it")
    others = [seam for seam in LISTED if upstream_of(seam) == ASCEND]
    rows = _child(version, [seam for seam in LISTED if seam not in others], vllm)
    if ascend.is_dir():
        rows |= _child(version, others, ROOT / "tests/ascend/stub", ascend, vllm)
    return {seam: rows[seam] for seam in LISTED if seam in rows}


def _child(version: str, seams: list[str], *paths: Path) -> Rows:
    inherited = os.environ.get("PYTHONPATH", "")
    ran = subprocess.run(
        [sys.executable, "-m", __spec__.name, version, *seams],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([*map(str, paths), inherited]),
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = json.loads(ran.stdout.splitlines()[-1])
    return {seam: (Found(found), why) for seam, (found, why) in rows.items()}


def look(seam: str) -> tuple[Found, str]:
    """Hold one seam against the vLLM of this process, whatever versions it is declared for."""
    from vllm.plugins import load_general_plugins

    assert vllm_version() == sys.argv[1], vllm_version()
    load_general_plugins()  # as in every process of vLLM; vllm-ascend's imports need it
    for target in targets_here(seam):
        module = target.path.partition(":")[0]
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - upstream's imports may raise anything
            absent = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else ""
            if not absent or not f"{module}.".startswith(f"{absent}."):
                return Found.UNKNOWN, f"{module} cannot be imported here: {error}"
    why = missing(seam)
    return (Found.GONE, why) if why else (Found.THERE, "")


def cell(seam: str, version: str, kept: Mapping[str, Rows]) -> str:
    """What the table says of a seam in one version."""
    found, _ = kept[version].get(seam, (None, ""))
    declared = SpecifierSet(load_seam(seam).HOLDS_FOR).contains(version, prereleases=True)
    match found:
        case None:
            return "-"
        case Found.THERE:
            return "holds" if declared else "unused"
        case Found.GONE:
            return "broken" if declared else "gone"
    return "?"


def table(kept: Mapping[str, Rows]) -> str:
    """The table of all seams and the versions that were looked at, and what some of them lack."""
    versions = sorted(kept, key=Version)
    lines = [
        f"| seam | why | declared for | {' | '.join(versions)} | where it does not hold |",
        "|---" * (len(versions) + 4) + "|",
    ]
    for seam in LISTED:
        module = load_seam(seam)
        upstream = "" if upstream_of(seam) != ASCEND else f"{ASCEND} "
        cells = [f"{upstream}`{module.HOLDS_FOR}`", *(cell(seam, v, kept) for v in versions)]
        lines.append(f"| `{seam}` | {module.WHY} | {' | '.join(cells)} | {module.WITHOUT} |")
    lacks: dict[str, list[str]] = {}
    for version in versions:
        for seam, (_, why) in kept[version].items():
            if why:
                short = re.sub(" is not there: .*", " is not there", why)
                lacks.setdefault(f"`{seam}`: {short}", []).append(version)
    notes = [f"- {', '.join(where)}, {what}." for what, where in sorted(lacks.items())]
    return "\n".join([*lines, "", *notes])


def read() -> dict[str, Rows]:
    """What was found, by version."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {
        version: {seam: (Found(found), why) for seam, (found, why) in rows.items()}
        for version, rows in kept.items()
    }


def write(kept: Mapping[str, Rows]) -> None:
    """Keep what was found, and put the table into the docs."""
    plain = {
        version: {seam: [found.value, why] for seam, (found, why) in kept[version].items()}
        for version in sorted(kept, key=Version)
    }
    RESULTS.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(kept)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
