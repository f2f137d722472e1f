"""Runs vLLM's own tests of its EPLB policy with ours in its place.

    .ci/upstream-tests

fetches the tests and calls this. Every test has to pass unless ``CHOICES`` names it, which tests
what vLLM's default chooses and not what a policy has to keep to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILE = "tests/distributed/test_eplb_algo.py"
CHOICES = {
    "test_basic_rebalance": "expects the very placement that the default finds",
    "test_extreme_weight_imbalance": (
        "expects three replicas of an expert on the two devices of its node; no device of ours "
        "holds an expert twice"
    ),
}
# So many placements must have been planned by ours; with fewer the tests would say nothing.
ENOUGH_PLANNED = 10


def main() -> int:
    """Run them, print what they gave, and return the exit status."""
    source = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        report, planned = Path(name) / "report.xml", Path(name) / "planned.json"
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "XLLM_PLANNED": str(planned),
        }
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(source)]
        command += ["-q", "-p", "eplb_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
        command += ["--noconftest", "--tb", "native", "--junitxml", str(report)]
        done = subprocess.run(
            [*command, str(source / FILE)],
            cwd=name,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):  # all passed, or some failed
            sys.exit(f"pytest failed as a whole:\n{done.stdout[-4000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
        ours = sum(json.loads(planned.read_text()))
    failed = {case.attrib["name"] for case in cases if case.find("failure") is not None}
    passed = len(cases) - len(failed) - sum(case.find("skipped") is not None for case in cases)
    print(f"{passed} of {len(cases)} EPLB tests pass with our policy, which planned {ours} times")
    problems = [f"ours: {test}" for test in sorted(failed - CHOICES.keys())]
    problems += [f"note: {test} passes, though it is listed" for test in CHOICES.keys() - failed]
    if ours < ENOUGH_PLANNED:
        problems.append("our policy planned too seldom to mean anything")
    if problems:
        print("\n".join([*problems, done.stdout[-4000:]]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
