"""``xllm doctor``: findings, exit statuses, and output for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.doubles import Install, feature_module
from xllm_plugins import cli, doctor
from xllm_plugins.compat import seams_here

pytestmark = pytest.mark.vllm


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the findings of ``xllm doctor --json ...``."""
    status = cli.main(["doctor", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_a_healthy_environment_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = asked(capsys)
    assert (status, found["problems"]) == (0, [])
    assert [seam["seam"] for seam in found["seams"]] == seams_here()
    decisions = {d["feature"]: (d["active"], d["reason"]) for d in found["decisions"]}
    assert decisions["scheduler"][0]
    assert decisions["service"] == (
        False,
        "service.routers and service.etcd name nobody to register with",
    )
    assert found["settings"]["scheduler.tpot_ms"] == [100.0, "default"]
    assert found["environment"]["vllm"]


def test_secrets_are_shown_to_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLLM_SERVICE_TOKEN", "hush")
    _, found = asked(capsys)
    assert "service.beat_s" in found["settings"]
    assert "service.token" not in found["settings"]
    assert "hush" not in str(found)


def test_people_read_the_same_findings_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--xllm-config", '{"scheduler": {"tpot_ms": 50}}']) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for title in ("environment", "seams", "features", "settings", "problems"):
        assert title in lines
    assert "scheduler.tpot_ms 50.0 --xllm-config" in lines
    assert "scheduler.ttft_ms 2000.0 default" in lines
    assert lines[-2:] == ["problems", "none"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--plugins", "xllm.sched"],
            "--plugins names 'xllm.sched', which is not known; the nearest is xllm.scheduler",
        ),
        (
            ["--xllm-config", '{"scheduler": {"tpot_ms": 0}}'],
            "scheduler.tpot_ms from --xllm-config is 0; allowed is a number above 0.",
        ),
        (["--xllm-config", "/no/such/file"], "--xllm-config is '/no/such/file', which cannot be"),
        (
            ["--xllm-config", '{"scheduler": {"policy": "elasti"}}'],
            "There is no scheduler.step policy named 'elasti'; installed are elastic.",
        ),
        (
            ["--xllm-config", '{"scheduler": {"mode": "off"}, "eplb": {"mode": "off"}}'],
            "--plugins xllm switches nothing on here.",
        ),
    ],
)
def test_what_cannot_work_is_a_problem_and_status_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    status, found = asked(capsys, *arguments)
    assert status == 1
    assert found["problems"][0].startswith(problem)


def test_the_selection_comes_from_the_environment_unless_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], install: Install
) -> None:
    install("oven", {"xllm_plugins": {"oven": "oven_p"}}, {"oven_p": feature_module("oven")})
    monkeypatch.setenv("XLLM_PLUGINS", "xllm.oven")
    active = {}
    for arguments in ((), ("--plugins", "xllm.scheduler")):
        _, found = asked(capsys, *arguments)
        active[arguments] = [d["feature"] for d in found["decisions"] if d["active"]]
    assert active == {(): ["oven"], ("--plugins", "xllm.scheduler"): ["scheduler"]}


@pytest.mark.parametrize("allowed", ["ascend", "", "ascend,other"])
def test_an_allow_list_without_us_is_a_problem_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    (problem,) = doctor.examine("xllm").problems
    remedy = f"VLLM_PLUGINS={allowed},xllm" if allowed else "VLLM_PLUGINS=xllm"
    assert f"VLLM_PLUGINS is {allowed!r}" in problem
    assert f"set {remedy} or unset it." in problem


def test_an_allow_list_with_us_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "ascend,xllm")
    assert doctor.examine("xllm").problems == []


def test_a_plugin_that_failed_to_load_is_a_problem(install: Install) -> None:
    install("bad", {"xllm_plugins": {"bad": "bad_p"}}, {"bad_p": "raise OSError('no disk')"})
    assert doctor.examine("xllm").problems == ["plugin bad failed to load: OSError: no disk"]


def test_settings_are_shown_as_the_server_would_see_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("scheduler: {mode: on, ttft_ms: 500}")
    monkeypatch.setenv("XLLM_SCHEDULER_TTFT_MS", "900")
    monkeypatch.setenv("XLLM_SCHEDULER_TPOT_MS", "40")
    _, found = asked(capsys, "--xllm-config", str(file))
    assert found["settings"]["scheduler.mode"] == ["on", f"file {file}"]
    assert found["settings"]["scheduler.ttft_ms"] == [500.0, f"file {file}"]
    assert found["settings"]["scheduler.tpot_ms"] == [40.0, "environment"]
