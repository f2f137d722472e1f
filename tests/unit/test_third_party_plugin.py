"""A stranger's plugin, really installed: found, selected by a setting, and planning a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shortest_first"

# Two offline prompts under way, and a budget of 100 tokens for the step.
PLAN = """
import json, math
from xllm_plugins.activation import load_settings
from xllm_plugins.latency import StepTime
from xllm_plugins.manager import registry
from xllm_scheduler.engine.policy import PrefillView, StepView

section = load_settings({}).sections["scheduler"]
registry().features()["scheduler"].check(section)
policy = registry().policy("scheduler.step", section.policy).factory(section)

def offline(name, tokens):
    return PrefillView(name, False, True, math.inf, tokens)

view = StepView(
    start_s=0.0,
    max_tokens=100,
    step_time=StepTime(base=1.0, token=0.1, ready=True),
    prefills=[offline("long", 900), offline("short", 80)],
)
plan = policy.plan(view)
print(json.dumps([type(policy).__name__, plan.chunk_tokens, sorted(plan.held)]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed into it."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *flags, str(EXAMPLE)], check=True)
    return target


def planned(policy: str, site: Path | None) -> subprocess.CompletedProcess[str]:
    """What a new process plans with this policy, the folder on its path or not."""
    environ = {**os.environ, "XLLM_SCHEDULER_POLICY": policy, "PYTHONPATH": str(site or "")}
    return subprocess.run(
        [sys.executable, "-c", PLAN], env=environ, capture_output=True, text=True, check=False
    )


def test_it_is_one_module_and_its_metadata(site: Path) -> None:
    assert {path.suffix for path in site.iterdir()} <= {".py", ".dist-info", ""}
    assert [path.name for path in site.glob("*.py")] == ["shortest_first.py"]


@pytest.mark.parametrize(
    ("policy", "plan"),
    [
        ("elastic", ["ElasticPolicy", {"long": 100, "short": 0}, []]),
        ("shortest-first", ["ShortestFirst", {"long": 20}, []]),
    ],
)
def test_the_setting_chooses_between_it_and_ours(
    site: Path, policy: str, plan: list[object]
) -> None:
    ran = planned(policy, site)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == plan


def test_where_it_is_not_installed_the_setting_is_refused() -> None:
    ran = planned("shortest-first", None)
    assert ran.returncode == 1
    assert "There is no scheduler.step policy named 'shortest-first'; installed are elastic." in (
        ran.stderr
    )
