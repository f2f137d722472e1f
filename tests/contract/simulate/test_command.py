"""``xllm simulate`` as its users call it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.contract.simulate.conftest import Write
from xllm_plugins.cli import main

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES, PAGE = ROOT / "examples" / "simulate", ROOT / "docs" / "simulate.md"


def simulated(*arguments: object, output: Path) -> dict[str, Any]:
    assert main(["simulate", *map(str, arguments), "--json", str(output)]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("name", ["colocation.yaml", "prefill-decode.yaml"])
def test_an_example_runs_and_serves_all(name: str, tmp_path: Path) -> None:
    (run,) = simulated(EXAMPLES / name, output=tmp_path / "run.json").values()
    summary = run["summary"]
    assert summary["online"] > 50
    assert summary["attainment"] > 0.9
    assert (summary["offline_total_tokens_s"] > 10_000) is (name == "colocation.yaml")
    assert bool(run["run"]["events"]) is (name == "prefill-decode.yaml")


def test_a_measured_machine_is_simulated(tmp_path: Path) -> None:
    scenario = EXAMPLES / "colocation-cpu.yaml"
    (run,) = simulated(scenario, "--seconds", 60, output=tmp_path / "run.json").values()
    assert run["step_times"]["origin"].startswith("measured by")
    assert run["summary"]["attainment"] > 0.8
    assert run["summary"]["offline_total_tokens_s"] > 20


def test_the_scenario_of_the_page_runs(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "scenario.yaml").write_text(shown)
    (run,) = simulated(tmp_path / "scenario.yaml", output=tmp_path / "run.json").values()
    assert run["summary"]["attainment"] > 0.9
    assert run["summary"]["offline_total_tokens_s"] > 1000
    assert [what for _, what in run["run"]["events"]] == ["i2 is lost", "i2 is back"]


def test_the_same_seed_gives_the_same_bytes(write: Write, tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{n}.json" for n in range(3))
    pages = [tmp_path / f"{n}.html" for n in range(2)]
    simulated(write(), "--html", pages[0], output=one)
    simulated(write(), "--html", pages[1], output=two)
    assert one.read_bytes() == two.read_bytes()
    assert pages[0].read_bytes() == pages[1].read_bytes()
    simulated(write(seed=1), output=other)
    assert one.read_bytes() != other.read_bytes()


def test_two_schedulers_are_compared(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = simulated(write(), "--compare", "vllm-fcfs", "elastic", output=tmp_path / "o.json")
    assert set(found) == {"vllm-fcfs", "elastic"}
    ratio = (
        found["elastic"]["summary"]["online_tokens_s"]
        / (found["vllm-fcfs"]["summary"]["online_tokens_s"])
    )
    assert f"online tokens: elastic has {ratio:.3f} times" in capsys.readouterr().out


def test_a_sweep_finds_the_highest_rate_of_each_setting(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = write(seconds=4)
    found = simulated(scenario, "--sweep", "tp=1", "--attainment", 0.95, output=tmp_path / "o.json")
    points = found["tp=1"]["sweep"]
    reached = [p["factor"] for p in points if p["summary"]["attainment"] >= 0.95]
    missed = [p["factor"] for p in points if p["summary"]["attainment"] < 0.95]
    assert max(reached) < min(missed) <= 1.021 * max(reached)
    assert f"tp=1: 95% attainment up to x{max(reached):.3g}" in capsys.readouterr().out


def test_options_stand_for_a_scenario(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt_tokens,output_tokens,at_s\n100,5,0\n200,5,1.5\n")
    (run,) = simulated(
        "--trace", trace, "--model", "Qwen3-8B", "--gpu", "h200", "--instances", 2,
        "--scheduler", "elastic", "--slo", "ttft=2000,tpot=50", "--kv-gib", 20,
        output=tmp_path / "run.json",
    ).values()  # fmt: skip
    assert [o["prompt_tokens"] for o in run["run"]["outcomes"]] == [100, 200]
    assert run["summary"]["attainment"] == 1.0
    assert run["scenario"]["instances"] == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpu": "h900"}, "gpu is 'h900'; allowed are a100, b200, cpu, h100, h200."),
        ({"tp": 3}, "There is no shipped profile of Qwen3-8B on h200 with --tp 3; allowed are"),
        ({"seconds": -1}, "seconds is -1: Input should be greater than 0."),
        ({"speed": 2}, "speed is 2: Extra inputs are not permitted."),
        ({"streams": []}, "streams is []: List should have at least 1 item"),
        ({"seconds": None}, "the scenario: seconds is missing; generated arrivals have no end."),
        ({"failures": [{"instance": "i9", "at_s": 1}]}, "failures names 'i9'; allowed are i0"),
        ({"settings": {"ttft": 3}, "scheduler": "elastic"}, "ttft"),
        ({"vllm": {"block_sise": 3}}, "vLLM does not take this engine"),
        ({"scheduler": "no.such.Class"}, "scheduler is 'no.such.Class'; allowed are vllm-fcfs"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(
    changes: dict[str, Any], sentence: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(write(**changes))]) == 2
    assert sentence in capsys.readouterr().err


def test_a_malformed_trace_names_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt_tokens,output_tokens,at_s\n100,5,0\n200,many,1.5\n")
    arguments = ["--trace", str(trace), "--model", "Qwen3-8B", "--slo", "ttft=2000,tpot=50"]
    assert main(["simulate", *arguments]) == 2
    assert f"{trace}, line 3: invalid literal" in capsys.readouterr().err
