"""The step clock: how long each step took, and when the next one will start."""

from __future__ import annotations

import pytest

from xllm_plugins.latency import StepShape, StepTime, StepTimeModel
from xllm_plugins.steps import StepClock

DECODE = StepShape().with_decodes(1, 100)
TWO_DECODES = StepShape().with_decodes(2, 200)


class Recorder(StepTimeModel):
    """Predicts 10 ms a decode and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.current = StepTime(decode=10.0, ready=True)
        self.seen: list[tuple[int, float]] = []
        self.shapes: list[StepShape] = []

    def observe(self, shape: StepShape, measured_ms: float) -> None:
        self.seen.append((shape.decodes, round(measured_ms, 6)))
        self.shapes.append(shape)


@pytest.fixture
def model() -> Recorder:
    return Recorder()


@pytest.fixture
def clock(model: Recorder) -> StepClock:
    return StepClock(model)


def test_one_step_at_a_time_takes_from_its_launch_to_its_end(
    clock: StepClock, model: Recorder
) -> None:
    clock.launched(1, DECODE, 1.000)
    clock.ended(1, 1.012)
    clock.launched(2, TWO_DECODES, 1.020)  # the engine was idle for 8 ms
    clock.ended(2, 1.045)
    assert model.seen == [(1, 12.0), (2, 25.0)]


def test_a_step_launched_behind_another_takes_from_the_end_of_that_one(
    clock: StepClock, model: Recorder
) -> None:
    clock.launched(1, DECODE, 1.000)
    clock.launched(2, DECODE, 1.001)
    clock.ended(1, 1.011)
    clock.launched(3, DECODE, 1.012)
    clock.ended(2, 1.023)
    clock.ended(3, 1.030)
    assert model.seen == [(1, 11.0), (1, 12.0), (1, 7.0)]


def test_the_next_step_starts_now_where_none_is_in_flight(clock: StepClock) -> None:
    assert clock.next_start_s(5.0) == 5.0
    clock.launched(1, DECODE, 5.0)
    clock.ended(1, 5.5)
    assert clock.next_start_s(5.4) == 5.4


def test_the_next_step_starts_at_the_predicted_end_of_those_in_flight(clock: StepClock) -> None:
    clock.launched(1, DECODE, 1.000)  # 10 ms: ends at 1.010
    assert clock.next_start_s(1.001) == pytest.approx(1.010)
    clock.launched(2, TWO_DECODES, 1.001)  # 20 ms behind it: ends at 1.030
    assert clock.next_start_s(1.002) == pytest.approx(1.030)
    clock.ended(1, 1.015)  # 5 ms late, so the second ends at 1.035
    assert clock.next_start_s(1.016) == pytest.approx(1.035)


def test_a_step_that_is_overdue_ends_now_at_the_earliest(clock: StepClock) -> None:
    clock.launched(1, DECODE, 1.000)
    assert clock.next_start_s(1.500) == 1.500


def test_an_empty_step_teaches_nothing(clock: StepClock, model: Recorder) -> None:
    clock.launched(1, StepShape(), 1.000)
    clock.ended(1, 1.001)
    assert model.seen == []


def test_steps_that_never_ended_are_forgotten(clock: StepClock, model: Recorder) -> None:
    clock.launched(1, DECODE, 1.000)
    clock.launched(2, DECODE, 1.001)
    clock.ended(2, 1.020)
    assert model.seen == [(1, 19.0)]
    assert clock.next_start_s(1.021) == 1.021


def test_the_model_is_given_the_shape_of_the_step(clock: StepClock, model: Recorder) -> None:
    shape = StepShape(100, 10_000, 700, 2, 70)
    clock.launched(1, shape, 1.0)
    clock.ended(1, 1.1)
    assert model.shapes == [shape]


def test_the_time_that_offline_work_adds_is_its_share_of_what_steps_took(clock: StepClock) -> None:
    clock.launched(1, TWO_DECODES, 1.000)
    clock.ended(1, 1.030)
    assert clock.offline_s == 0.0
    clock.launched(2, TWO_DECODES, 2.000, online=DECODE)  # predicted 20 ms, 10 of them online
    clock.ended(2, 2.030)
    assert clock.offline_s == pytest.approx(0.015)
    clock.launched(3, DECODE, 3.000, online=StepShape())
    clock.ended(3, 3.020)
    assert clock.offline_s == pytest.approx(0.035)


def test_a_model_that_knows_nothing_blames_nothing_on_offline_work(
    clock: StepClock, model: Recorder
) -> None:
    model.current = StepTime()
    clock.launched(1, TWO_DECODES, 1.0, online=DECODE)
    clock.ended(1, 9.0)
    assert clock.offline_s == 0.0
