"""The other ways in: vLLM's own ``--config`` file, a third party's policy, and ``vllm.LLM``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.lab.model import ROOT
from benchmarks.lab.server import ServerError, cpu_environment
from tests.serve.conftest import PROMPTS, Start

pytestmark = pytest.mark.serve

_OFFLINE_USE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=1024, dtype="float32")
    config = llm.llm_engine.vllm_config
    params = SamplingParams(max_tokens=8, temperature=0, extra_args={"xllm_class": "offline"})
    (output,) = llm.generate(["The capital of France is"], params)
    print("RESULT", json.dumps([config.scheduler_config.scheduler_cls, output.outputs[0].text]))
"""


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, installed as its users would."""
    target = tmp_path_factory.mktemp("site")
    source = ROOT / "examples" / "shortest_first"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


def test_a_config_file_selects_a_third_partys_policy(
    start: Start, third_party: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "xllm.yaml"
    settings.write_text(yaml.safe_dump({"scheduler": {"policy": "shortest-first"}}))
    config = tmp_path / "vllm.yaml"
    config.write_text(yaml.safe_dump({"plugins": "xllm", "xllm-config": str(settings)}))
    with start("--config", str(config), env={"PYTHONPATH": str(third_party)}) as server:
        assert server.ask(PROMPTS[0])
        assert server.ask(PROMPTS[1], vllm_xargs={"xllm_class": "offline"})
        status = server.request("GET", "/xllm/v1/status")
    assert status["settings"]["scheduler.policy"] == {
        "value": "shortest-first",
        "origin": f"file {settings}",
    }
    assert (
        status["engines"][0]["scheduler"] | {"policy_failure": ""}
        == (status["engines"][0]["scheduler"])
    )
    assert status["engines"][0]["scheduler"]["policy"] == "shortest-first"


def test_llm_uses_the_plugins_that_the_environment_names(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "use.py"
    script.write_text(_OFFLINE_USE)
    ran = subprocess.run(
        [sys.executable, str(script), str(model)],
        env={**cpu_environment(), "XLLM_PLUGINS": "xllm.scheduler"},
        check=True,
        capture_output=True,
        text=True,
    )
    (result,) = (line for line in ran.stdout.splitlines() if line.startswith("RESULT "))
    scheduler, text = json.loads(result.removeprefix("RESULT "))
    assert scheduler == "xllm_scheduler.engine.scheduler.elastic_scheduler"
    assert "Paris" in text


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--plugins", "xllm.schduler"], "the nearest is xllm.scheduler"),
        (
            ["--plugins", "xllm", "--xllm-config", '{"scheduler": {"policy": "nope"}}'],
            "There is no scheduler.step policy named 'nope'; installed are elastic.",
        ),
    ],
)
def test_input_that_cannot_work_ends_the_start_with_one_sentence(
    start: Start, args: list[str], sentence: str
) -> None:
    with pytest.raises(ServerError, match="exited with status") as failure, start(*args):
        pass
    assert sentence in str(failure.value)


def test_without_us_on_the_operators_list_vllm_does_not_know_the_option() -> None:
    ran = subprocess.run(
        [str(Path(sys.executable).with_name("xllm")), "doctor"],
        env={**os.environ, "VLLM_PLUGINS": "lora_filesystem_resolver"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert "set VLLM_PLUGINS=lora_filesystem_resolver,xllm" in ran.stdout
