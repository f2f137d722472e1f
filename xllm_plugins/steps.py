"""Measures engine steps: what each computed, how long it took, when the next one will start."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from xllm_plugins.latency import StepShape, StepTimeModel


class _Launched(NamedTuple):
    key: int
    at_s: float
    shape: StepShape
    predicted_ms: float
    offline_share: float


class StepClock:
    """Follows steps from launch to end, also where several are in flight.

    With asynchronous scheduling a step is launched while the one before it still runs. Its own time
    is then ``end(n) - max(launch(n), end(n - 1))``.

    Attributes:
        offline_s: the time that offline work has added to steps, all together.
    """

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self._in_flight: deque[_Launched] = deque()
        self._last_end_s = 0.0
        self.offline_s = 0.0

    def next_start_s(self, now_s: float) -> float:
        """When a step that is planned now will start."""
        free_s = self._last_end_s
        for step in self._in_flight:
            free_s = max(free_s, step.at_s) + step.predicted_ms / 1e3
        return max(now_s, free_s) if self._in_flight else now_s

    @property
    def in_flight(self) -> bool:
        """Whether a step is launched and has not ended."""
        return bool(self._in_flight)

    def launched(
        self, key: int, shape: StepShape, now_s: float, online: StepShape | None = None
    ) -> None:
        """Note a step.

        Args:
            key: to find it by when it ends.
            shape: what it computes.
            now_s: the time.
            online: what it computes for online requests, where that is not all.
        """
        step_ms = self._model.current.step_ms
        predicted_ms = 0.0 if shape.is_empty else step_ms(shape)
        share = 0.0
        if online is not None and predicted_ms > 0.0:
            share = 1.0 - (0.0 if online.is_empty else step_ms(online)) / predicted_ms
        self._in_flight.append(_Launched(key, now_s, shape, predicted_ms, share))

    def ended(self, key: int, now_s: float) -> None:
        """Note the end of a step and learn from it; steps that never ended are forgotten."""
        while self._in_flight:
            step = self._in_flight.popleft()
            if step.key != key:
                continue
            took_s = now_s - max(step.at_s, self._last_end_s)
            self._last_end_s = now_s
            self.offline_s += max(0.0, took_s) * step.offline_share
            if not step.shape.is_empty and took_s > 0.0:
                self._model.observe(step.shape, took_s * 1e3)
            return
