"""The chart under Helm's own code, in a process of its own, since that brings Go's runtime along.

    python -m tests.deploy.chart '[{"auth": {"adminToken": "secret"}}]'

prints what Helm's linter finds, and for each of the values the manifests, or why there are none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
CHART = DEPLOY / "helm" / "xllm"


class Helm(NamedTuple):
    """What Helm says of the chart.

    Attributes:
        findings: its linter's warnings and errors.
        made: for each of the values the manifests, or why there are none.
    """

    findings: list[str]
    made: list[list[dict[str, Any]] | str]


def helm(values: Sequence[Mapping[str, Any]]) -> Helm:
    """Lints the chart and renders it with each of these values."""
    command = [sys.executable, "-m", "tests.deploy.chart", json.dumps(values)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    return Helm(found["findings"], [_manifests(one) for one in found["made"]])


def _manifests(made: dict[str, str] | str) -> list[dict[str, Any]] | str:
    if isinstance(made, str):
        return made
    return [one for text in made.values() for one in yaml.safe_load_all(text) if one]


def _main() -> None:
    import helm_python

    report = helm_python.lint(CHART, strict=True)
    warnings = [one["error"] for one in report["messages"] if one["severity"] > 1]
    made: list[Any] = []
    with helm_python.Chart.load(CHART) as chart:
        for values in json.loads(sys.argv[1]):
            try:
                made.append(chart.render(values, name="demo", namespace="serving"))
            except helm_python.HelmError as error:
                made.append(str(error))
    print(json.dumps({"findings": [*report["errors"], *warnings], "made": made}))


if __name__ == "__main__":
    _main()
