"""Step-time profiles: the shipped ones say what they were fitted to; files are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xllm_plugins.errors import ConfigError
from xllm_plugins.latency import StepShape
from xllm_scheduler.simulate.profiles import find_profile, load_profile, shipped


def decodes(batch: int, context: int) -> StepShape:
    return StepShape(decodes=batch, decode_context=batch * context)


@pytest.mark.parametrize(
    ("shape", "measured_ms"),
    [
        (StepShape().with_chunk(1024, 0), 22.1),
        (StepShape().with_chunk(4096, 0), 91.2),
        (StepShape().with_chunk(16384, 0), 455.0),
        (decodes(1, 2048), 5.1),
        (decodes(64, 2048), 10.2),
        (decodes(256, 2048), 25.8),
        (decodes(128, 2048).with_chunk(2048, 0), 55.3),
    ],
)
def test_the_shipped_fit_is_near_what_it_was_fitted_to(
    shape: StepShape, measured_ms: float
) -> None:
    """Spot values of H200 with Qwen3-8B from the same source, a mixed step among them."""
    profile = find_profile("h200", "Qwen/Qwen3-8B", 1)
    assert profile.step_ms(shape) == pytest.approx(measured_ms, rel=0.08)


def test_a_prompt_costs_the_same_in_chunks_but_for_the_steps_bases() -> None:
    profile = find_profile("h200", "qwen3-32b", 4)
    assert profile.prefill_base_ms is not None
    whole = profile.step_ms(StepShape().with_chunk(8192, 0))
    halves = [profile.step_ms(StepShape().with_chunk(4096, done)) for done in (0, 4096)]
    assert sum(halves) - profile.prefill_base_ms == pytest.approx(whole)


def test_experts_are_in_the_decode_time_of_a_mixture() -> None:
    profile = find_profile("h200", "Qwen3-30B-A3B", 1)
    rises = [profile.step_ms(decodes(batch, 1)) for batch in (1, 9, 129, 137)]
    assert rises[1] - rises[0] > 5 * (rises[3] - rises[2])


def test_every_shipped_profile_says_where_it_comes_from() -> None:
    assert len(shipped()) == 19
    for profile in shipped().values():
        assert "aiconfigurator-core 0.12.0" in profile.origin
        assert set(profile.error) == {"prefill", "decode"}


def test_a_profile_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(
        ConfigError, match=r"no shipped profile of gpt on h200.*Qwen3-8B.*--profile"
    ):
        find_profile("h200", "gpt", 1)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = find_profile("b200", "Meta-Llama-3.1-70B", 4)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile.document()))
    again = load_profile(path)
    assert again.document() == profile.document()
    shape = decodes(17, 900).with_chunk(300, 40)
    assert again.step_ms(shape) == profile.step_ms(shape)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([1], "holds no JSON object"),
        ({"step_time": {}}, "no step_time with at least a base"),
        ({"step_time": {"base": -1}}, "step_time.base -1; allowed are numbers at least 0"),
        ({"step_time": {"base": 1, "tokn": 2}}, "step_time.tokn 2"),
        ({"step_time": {"base": 1}, "hots_ms": 3}, "has 'hots_ms'; allowed are"),
    ],
)
def test_a_spoilt_profile_is_refused(tmp_path: Path, document: Any, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    assert said in str(error.value)
