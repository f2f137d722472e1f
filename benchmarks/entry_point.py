"""Claim: an installed but dormant xllm costs vLLM's start-up less than 20 ms.

Each round is a fresh process that has imported what ``vllm serve`` has imported when it loads
general plugins, and then loads and calls our entry point:

    python -m benchmarks.entry_point --rounds 10
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

LIMIT_MS = 20.0
_PROBE = """
import json, sys, time
from importlib.metadata import entry_points
import vllm.engine.arg_utils
entry, = entry_points(group="vllm.general_plugins", name="xllm")
before, began = set(sys.modules), time.perf_counter()
entry.load()()
took = (time.perf_counter() - began) * 1e3
print(json.dumps({"ms": took, "modules": len(set(sys.modules) - before)}))
"""


def measure() -> tuple[float, int]:
    """Milliseconds and newly imported modules of one fresh process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLLM_")}
    output = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, check=True, capture_output=True, text=True
    ).stdout
    result = json.loads(output.splitlines()[-1])
    return float(result["ms"]), int(result["modules"])


def main() -> int:
    """Print the times; status 1 if the median is above the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = [measure() for _ in range(parser.parse_args().rounds)]
    times = sorted(ms for ms, _ in rounds)
    median = statistics.median(times)
    print(
        f"entry point: median {median:.1f} ms, min {times[0]:.1f}, max {times[-1]:.1f} "
        f"({rounds[0][1]} modules imported); claim: under {LIMIT_MS:.0f} ms"
    )
    return 0 if median < LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
