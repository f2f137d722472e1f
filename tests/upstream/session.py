"""One pytest session over an upstream's own tests, with a plugin of ours, and what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Outcomes = dict[str, dict[str, Any]]
_PYTEST = (
    sys.executable, "-m", "pytest", "-c", os.devnull, "-q", "-p", "no:cacheprovider",
    # Source of failing code is not wanted, and pytest cannot parse all of it.
    "-W", "ignore", "--tb", "native", "--continue-on-collection-errors", "--timeout", "120",
)  # fmt: skip


def outcomes_of(
    source: Path,
    files: Sequence[str],
    folder: Path,
    plugin: str,
    options: Sequence[str],
    *,
    hub: Path,
    env: Mapping[str, str] = {},
    path: Sequence[str] = (),
) -> Outcomes:
    """What the plugin writes of each test.

    Args:
        source: the upstream's source package, unpacked.
        files: of its tests.
        folder: made for this session; tests leave files where they run.
        plugin: a module of this folder, with the option ``--outcomes FILE``.
        options: of it, and of pytest.
        hub: a cache of models.
        env: more of the environment.
        path: more places to import from.

    Raises:
        SystemExit: there was no session of tests.
    """
    folder.mkdir()
    outcomes, log = folder / "outcomes.json", folder / "log"
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(source), *path]),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **env,
    }
    command = [*_PYTEST, "--rootdir", str(source), "-p", plugin, "--outcomes", str(outcomes)]
    command += [*options, *(str(source / file) for file in files)]
    with log.open("w") as sink:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=sink, stderr=sink, check=False
        )
    if done.returncode not in (0, 1):  # all passed, or some failed
        sys.exit(f"pytest failed as a whole:\n{log.read_text()[-4000:]}")
    found: Outcomes = json.loads(outcomes.read_text())
    return found
