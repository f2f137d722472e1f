"""``xllm profile``: what was observed becomes a profile that explains it."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_plugins.cli import main
from xllm_plugins.latency import StepShape
from xllm_scheduler.simulate.measure import Measured


def measured(request_ms: float = 5.0) -> Measured:
    """An engine with 10 ms a step, 0.1 ms a prompt token, 0.5 ms a decode and 1 us a context token.

    Prefills are observed from outside, so what surrounds the step is in them.
    """
    prefills = [(n, request_ms + 10.0 + 0.1 * n + 1e-5 * n * n) for n in (16, 64, 256, 1024)]
    decodes = [
        (batch, context, 10.0 + 0.5 * batch + 1e-3 * batch * context)
        for batch in (1, 4, 16)
        for context in (40.0, 500.0)
    ]
    return Measured(prefills, decodes, jitter=0.07)


def test_a_profile_explains_what_was_observed() -> None:
    profile = measured().profile("model", "made up")
    time = profile.step_time
    found = [time.base, time.decode, time.context, time.token, time.square, profile.request_ms]
    assert found == pytest.approx([10.0, 0.5, 1e-3, 0.1, 1e-5, 5.0], rel=1e-3)
    assert profile.jitter == 0.07
    assert max(profile.error.values()) < 1e-4


def test_a_prompt_in_chunks_costs_what_it_costs_whole() -> None:
    profile = measured(request_ms=0.0).profile("model", "made up")
    whole = profile.step_ms(StepShape().with_chunk(1000, 0))
    halves = [profile.step_ms(StepShape().with_chunk(500, p)) for p in (0, 500)]
    assert sum(halves) == pytest.approx(whole + profile.step_time.base)


@pytest.mark.parametrize("option", ["--most-tokens", "--most-batch"])
def test_too_few_sizes_for_a_fit_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--base-url", "http://127.0.0.1:9", "--output", str(tmp_path / "p.json")]
    assert main(["profile", *arguments, option, "2"]) == 2
    assert f"{option} is too small for a fit" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.json"
    assert main(["profile", "--base-url", "http://127.0.0.1:9", "--output", str(output)]) != 0
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert not output.exists()
