"""How far simulations with the shipped profiles are from published measurements.

    python -m benchmarks.sim_silicon aic_silicon_sample.csv

The file is aiconfigurator's (Apache-2.0). Its rows of vLLM have fp8 weights, the profiles bf16.
They were measured as InferenceMAX does: ten requests for each outstanding one, their lengths drawn
uniformly from 0.8 to 1 of those that are given.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import math
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.lab.model import ROOT
from xllm_scheduler.service.routing import Role
from xllm_scheduler.service.staged import least_loaded
from xllm_scheduler.simulate.cluster import Cluster
from xllm_scheduler.simulate.engine import FCFS, Engine, EngineSpec
from xllm_scheduler.simulate.hardware import LINKS
from xllm_scheduler.simulate.members import ClusterSpec
from xllm_scheduler.simulate.profiles import Profile, shipped
from xllm_scheduler.simulate.workload import Ask, Slo, Stream

_WAVES = 10  # requests for each of those that are outstanding
_SHORTEST = 0.8  # of the lengths that are given


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        profile: the name of the shipped profile of its GPU, model and tensor parallelism.
        precision: of the weights that were measured.
        prompt_tokens, output_tokens: of the longest request.
        concurrency: requests outstanding at any time.
        ttft_ms, tpot_ms: means.
    """

    profile: str
    precision: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float


def points(rows: Iterable[dict[str, str]]) -> list[Point]:
    """The rows of vLLM for which there is a profile."""
    known = {_key(*name.split("|")): name for name in shipped()}
    found = []
    for row in rows:
        name = known.get(_key(row["system"], row["model_path"], f"tp{row['tp_size']}"))
        if name is None or row["backend"] != "vllm" or row["mode"] != "agg":
            continue
        lengths = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
        took = float(row["silicon_ttft_ms"]), float(row["silicon_tpot_ms"])
        found.append(Point(name, row["precision"], *lengths, *took))
    return sorted(found, key=dataclasses.astuple)


def _key(system: str, model: str, parallel: str) -> tuple[str, str, str]:
    # The same model is called with and without "Meta-" in front.
    return system, model.rsplit("/", 1)[-1].removeprefix("Meta-"), parallel


def simulated(point: Point, engine: Engine, profile: Profile) -> tuple[float, float]:
    """Mean TTFT and TPOT in ms of the same closed loop."""
    draw = random.Random(0)

    def length(longest: int) -> int:
        return draw.randint(math.ceil(_SHORTEST * longest), longest)

    asks = [
        Ask(0.0, length(point.prompt_tokens), length(point.output_tokens))
        for _ in range(_WAVES * point.concurrency)
    ]
    loop = Stream("loop", True, Slo(), asks, outstanding=point.concurrency)
    steps = point.output_tokens * (_WAVES + 1)
    seconds = 2.0 * steps * max(point.tpot_ms, profile.step_time.base) / 1e3
    cluster = Cluster(ClusterSpec([Role.MIXED], LINKS["nvlink"]), engine, profile, least_loaded())
    done = [o for o in cluster.run([loop], seconds=seconds).outcomes if o.finished]
    if len(done) < len(loop.asks):
        raise SystemExit(f"{point}: only {len(done)} of {len(loop.asks)} were answered in time")
    return (
        statistics.fmean(o.ttft_ms for o in done if o.ttft_ms is not None),
        statistics.fmean(o.tpot_ms for o in done if o.tpot_ms is not None),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates every point and prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("measured", type=Path, help="aic_silicon_sample.csv")
    parser.add_argument("--gpu", default="h200", help="whose rows; empty for all")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "sim_silicon.json"
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # vLLM tells of each engine
    with options.measured.open(encoding="utf-8", newline="") as lines:
        found = [p for p in points(csv.DictReader(lines)) if p.profile.startswith(options.gpu)]
    if not found:
        raise SystemExit(f"{options.measured} has no row of vLLM for which there is a profile")
    engines: dict[str, Engine] = {}
    made = Table(title="Measured / simulated (error)")
    for heading in ("profile", "weights", "prompt", "output", "concurrency", "TTFT ms", "TPOT ms"):
        made.add_column(heading, justify="left" if heading == "profile" else "right")
    errors: list[tuple[float, float]] = []
    document = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    for point in track(found, description="simulating", console=Console(stderr=True)):
        gpu, model, parallel = point.profile.split("|")
        if point.profile not in engines:
            spec = EngineSpec(model, gpu.split("_")[0], int(parallel.removeprefix("tp")), FCFS)
            engines[point.profile] = Engine(spec)
        ttft_ms, tpot_ms = simulated(point, engines[point.profile], shipped()[point.profile])
        errors.append((ttft_ms / point.ttft_ms - 1.0, tpot_ms / point.tpot_ms - 1.0))
        document.append({**dataclasses.asdict(point), "simulated_ms": [ttft_ms, tpot_ms]})
        made.add_row(
            point.profile,
            point.precision,
            *(str(n) for n in (point.prompt_tokens, point.output_tokens, point.concurrency)),
            f"{point.ttft_ms:.0f} / {ttft_ms:.0f} ({errors[-1][0]:+.0%})",
            f"{point.tpot_ms:.1f} / {tpot_ms:.1f} ({errors[-1][1]:+.0%})",
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    console.print(made)
    for name, column in zip(("TTFT", "TPOT"), zip(*errors, strict=True), strict=True):
        absolute = sorted(abs(error) for error in column)
        print(
            f"{name}: mean error {statistics.fmean(absolute):.0%}, median "
            f"{statistics.median(absolute):.0%}, largest {absolute[-1]:.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
