"""Saved step-time profiles: what a restart starts from, and that nothing about them can fail."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xllm_plugins.latency import StepShape, StepTime, StepTimeModel
from xllm_scheduler.engine import profiles
from xllm_scheduler.engine.profiles import Profile, profile_key

KEY = {"model": "tiny", "dtype": "bfloat16", "tensor_parallel": 1}
TRUE = StepTime(base=4.0, token=0.02, square=1e-6, cross=2e-6, decode=0.1, context=1e-5)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM has a say in what loggers under its name pass on.
    monkeypatch.setattr(profiles, "logger", logging.getLogger("test"))


def warm(steps: int = 40, idle_experts: float = 1.0) -> StepTimeModel:
    model = StepTimeModel(idle_experts)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        shape = StepShape().with_decodes(int(rng.integers(1, 30)), int(rng.integers(1, 9999)))
        shape = shape.with_chunk(int(rng.integers(0, 900)), int(rng.integers(0, 4096)))
        model.observe(shape, TRUE.step_ms(shape))
    return model


def saved(directory: Path, model: StepTimeModel | None = None) -> Path:
    """The file of one saved profile."""
    Profile("", str(directory), KEY, model or warm()).save()
    (found,) = directory.glob("*.json")
    return found


def restored(directory: Path, model: StepTimeModel | None = None) -> tuple[str, StepTimeModel]:
    """Where a later process starts from: the origin of its profile, and its model."""
    model = model or StepTimeModel()
    return Profile("", str(directory), KEY, model).origin, model


def test_a_later_process_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    first = warm()
    path = saved(tmp_path, first)
    origin, second = restored(tmp_path)
    assert origin == str(path)
    assert second.current == first.current
    assert second.current.ready


def test_a_profile_is_one_whole_file_with_its_key(tmp_path: Path) -> None:
    path = saved(tmp_path / "made" / "on demand")
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["key"] == KEY


def test_another_key_has_another_file(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Profile("", str(tmp_path), {**KEY, "tensor_parallel": 2}, warm())
    assert other.origin == "none"
    other.save()
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_given_profile_wins_over_the_saved_one_and_may_be_of_another_machine(
    tmp_path: Path,
) -> None:
    saved(tmp_path / "own")
    given = saved(tmp_path / "given", warm(60)).rename(tmp_path / "mine.json")
    model = StepTimeModel()
    profile = Profile(str(given), str(tmp_path / "own"), {**KEY, "dtype": "float32"}, model)
    assert profile.origin == str(given)
    assert model.current == warm(60).current


@pytest.mark.parametrize("directory", ["", "new"])
def test_without_a_saved_profile_it_starts_cold_and_says_nothing(
    directory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = StepTimeModel()
    profile = Profile("", str(tmp_path / directory) if directory else "", KEY, model)
    assert (profile.origin, model.current.ready) == ("none", False)
    assert not caplog.records


def _with(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document["profile"] |= changes
    path.write_text(json.dumps(document))


SPOILT: dict[str, Any] = {
    "half a file": lambda path: path.write_text(path.read_text()[:99]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "no object": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "no profile": lambda path: path.write_text("{}"),
    "profile is null": lambda path: path.write_text('{"profile": null}'),
    "profile is a list": lambda path: path.write_text('{"profile": [1]}'),
    "no matrix": lambda path: path.write_text('{"profile": {"step_time_ms": {}}}'),
    "an unknown term": lambda path: _with(path, step_time_ms={"warp": 1.0}),
    "six terms": lambda path: _with(path, gram=np.eye(6).tolist()),
    "a ragged matrix": lambda path: _with(path, gram=[[1.0], [1.0, 2.0]]),
    "words": lambda path: _with(path, moment=["much"] * 7),
    "not finite": lambda path: _with(path, moment=[float("nan")] * 7),
    "a negative term": lambda path: _with(path, step_time_ms={"base": -1.0}),
    "a term that is text": lambda path: _with(path, step_time_ms={"base": "fast"}),
    "a term that is null": lambda path: _with(path, step_time_ms={"base": None}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_cannot_be_used_is_a_warning_and_a_cold_start(
    spoil: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path)
    SPOILT[spoil](path)
    origin, model = restored(tmp_path)
    assert origin == "none"
    assert model.current == StepTime()
    assert model.steps == 0
    assert f"The step-time profile {path} is not used: " in caplog.text


@pytest.mark.parametrize("name", ["error", "most_prefill_tokens"])
@pytest.mark.parametrize("value", ["much", None, float("nan"), float("inf")])
def test_a_file_whose_other_numbers_are_none_is_a_warning_and_a_cold_start(
    name: str, value: Any, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    _with(path, step_time_ms={name: value})
    origin, model = restored(tmp_path)
    assert (origin, model.steps) == ("none", 0)


def test_a_profile_of_other_experts_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    origin, model = restored(tmp_path, StepTimeModel(idle_experts=0.75))
    assert (origin, model.current.ready) == ("none", False)
    assert "it was measured with other experts" in caplog.text


def test_a_given_profile_that_is_not_there_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Profile(str(tmp_path / "gone"), "", KEY, StepTimeModel()).origin == "none"
    assert "gone is not used" in caplog.text


@pytest.mark.parametrize("below", ["", "below"])
def test_a_place_that_cannot_be_written_is_a_warning(
    below: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    Profile("", str(tmp_path / "file" / below), KEY, warm()).save()
    assert "could not be saved" in caplog.text


def test_what_was_not_learned_yet_and_what_has_no_place_is_not_saved(tmp_path: Path) -> None:
    Profile("", str(tmp_path), KEY, StepTimeModel()).save()
    Profile("", "", KEY, warm()).save()
    assert not list(tmp_path.iterdir())


def test_it_is_saved_after_500_steps_and_then_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    model = SimpleNamespace(steps=0)
    profile = Profile("", str(tmp_path), KEY, model)  # type: ignore[arg-type]

    class Immediately:
        def __init__(self, target: Any, name: str, daemon: bool) -> None:
            self.start = lambda: saves.append(model.steps)

    monkeypatch.setattr("threading.Thread", Immediately)
    for model.steps in range(6000):
        profile.save_sometimes()
    assert saves == [500, 5000]


def test_the_key_names_what_step_times_depend_on() -> None:
    pytest.importorskip("vllm")
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="tiny", dtype="torch.bfloat16", quantization=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
    )
    key = profile_key(config)
    assert (key["model"], key["dtype"], key["quantization"]) == ("tiny", "torch.bfloat16", "None")
    assert (key["tensor_parallel"], key["pipeline_parallel"]) == (2, 1)
    assert key["device"]
