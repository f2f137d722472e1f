"""What the scheduler remembers of each request, and what it counts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_plugins.latency import StepTime
from xllm_plugins.metrics import Metric, Sample
from xllm_scheduler.classes import Service, ServiceClass
from xllm_scheduler.engine.policy import Late, StepPlan

_BY_CLASS = ("class",)
_NEWEST_PROMPT, _NEWEST_GAP = 0.1, 0.2
_FORGET_S = 60.0  # without a finished request, misses count for a third after so long
_RECENT = 0.05  # of the newest request in the recent attainment

METRICS = (
    Metric("scheduler_requests", "counter", "Requests taken in.", _BY_CLASS),
    Metric("scheduler_requests_waiting", "gauge", "Requests that wait.", _BY_CLASS),
    Metric("scheduler_requests_running", "gauge", "Requests that run.", _BY_CLASS),
    Metric("scheduler_requests_finished", "counter", "Requests answered in full.", _BY_CLASS),
    Metric("scheduler_held", "counter", "Steps that running requests sat out.", _BY_CLASS),
    Metric("scheduler_preempted", "counter", "Requests that lost their KV.", _BY_CLASS),
    Metric("scheduler_ttft_seconds", "counter", "Sum of times to first token.", _BY_CLASS),
    Metric("scheduler_tpot_seconds", "counter", "Sum of mean times per output token.", _BY_CLASS),
    Metric("scheduler_slo_met", "counter", "Finished online requests that met both SLOs."),
    Metric("scheduler_attainment_ratio", "gauge", "Recent share of them, of about 20 requests."),
    Metric("scheduler_slack_seconds", "gauge", "Time left for the step that was planned last."),
    Metric(
        "scheduler_budget_used_ratio", "gauge", "Share of that time that the plan makes use of."
    ),
    Metric("scheduler_step_time_error_ratio", "gauge", "Mean error of predicted step times, 0..1."),
    Metric("scheduler_steps", "counter", "Steps planned."),
    Metric(
        "scheduler_late_steps",
        "counter",
        "Steps planned to take longer than online deadlines leave them.",
        ("reason",),
    ),
    Metric("scheduler_policy_seconds", "counter", "Time spent planning steps."),
)


@dataclass(slots=True)
class Served:
    """One request, attached to it as ``request.xllm``; times are of ``time.monotonic()``.

    Attributes:
        offline_s: the time that offline work had added to steps when it arrived, later when its
            first token came.
        first_alone_s: when the first token would have come without offline work.
    """

    service: Service
    arrival_s: float
    online: bool
    first_due_s: float
    tpot_s: float
    offline_s: float
    first_token_s: float | None = None
    first_alone_s: float = 0.0

    @classmethod
    def of(cls, service: Service, arrival_s: float, offline_s: float = 0.0) -> Served:
        """The record of a request that has just arrived.

        Args:
            service: its class and SLOs.
            arrival_s: when it arrived.
            offline_s: the time that offline work has added to steps so far.
        """
        due_s = arrival_s + service.ttft_ms / 1e3 if service.online else math.inf
        return cls(service, arrival_s, service.online, due_s, service.tpot_ms / 1e3, offline_s)


def served(request: Any) -> Served | None:
    """The record of a request; None if it never came through ``add_request``."""
    found: Served | None = getattr(request, "xllm", None)
    return found


def is_online(request: Any) -> bool:
    """Whether a request has SLOs; one that we know nothing of is treated as online."""
    record = getattr(request, "xllm", None)
    return record is None or record.online


def due_s(request: Any) -> float:
    """When the next token of a request is due: its place among those that wait."""
    record = served(request)
    if record is None:
        return 0.0
    if record.first_token_s is None or not record.online:
        return record.first_due_s
    return record.first_token_s + float(request.num_output_tokens) * record.tpot_s


class Demand:
    """What online requests ask for: recent means, the newest counts for a tenth or a fifth."""

    def __init__(self) -> None:
        self.prompt_tokens = 0.0
        self.output_tokens = 0.0
        self._gap_s = math.inf
        self._last_s = -math.inf

    def arrived(self, prompt_tokens: int, now_s: float) -> None:
        """Note an online request."""
        gap_s = now_s - self._last_s
        if self._last_s == -math.inf:
            self.prompt_tokens = float(prompt_tokens)
        elif self._gap_s == math.inf:
            self._gap_s = gap_s
        else:
            self._gap_s += _NEWEST_GAP * (gap_s - self._gap_s)
        self.prompt_tokens += _NEWEST_PROMPT * (prompt_tokens - self.prompt_tokens)
        self._last_s = now_s

    def finished(self, output_tokens: int) -> None:
        """Note the length of an answer."""
        weight = _NEWEST_PROMPT if self.output_tokens else 1.0
        self.output_tokens += weight * (output_tokens - self.output_tokens)

    def rate(self, now_s: float) -> float:
        """Online requests per second."""
        gap_s = max(self._gap_s, now_s - self._last_s)
        return 1.0 / gap_s if gap_s > 0.0 else 0.0

    def prompt_blocks(self, block_size: int) -> int:
        """KV blocks for a prompt of the mean length."""
        return math.ceil(self.prompt_tokens / block_size)


class Books:
    """Counts by class.

    Attributes:
        now_s: the end of the step whose output is being taken in.
        offline_s: the time that offline work has added to steps until then.
        attainment: the share of recent online requests that met both SLOs.
    """

    def __init__(self) -> None:
        self.now_s = self.offline_s = 0.0
        self._attained_s = 0.0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._ttft_s: defaultdict[str, float] = defaultdict(float)
        self._tpot_s: defaultdict[str, float] = defaultdict(float)
        self._late: Counter[Late] = Counter()
        self._slo_met = 0
        self.attainment = self._relative_attainment = 1.0
        self._steps = 0
        self._policy_s = 0.0
        self._plan = StepPlan(0)

    def count(self, what: str, request: Any) -> None:
        """Count something that happened to a request."""
        self._counts[what, _class(is_online(request))] += 1

    def planned(self, plan: StepPlan, took_s: float) -> None:
        """Count one step and the time that planning it took."""
        self._steps += 1
        self._policy_s += took_s
        self._plan = plan
        if plan.late is not None:
            self._late[plan.late] += 1

    def first_token(self, request: Any) -> None:
        """Note that the first token of a request came with the step that just ended."""
        record = served(request)
        if record is not None and record.first_token_s is None:
            record.first_token_s = self.now_s
            record.first_alone_s = self.now_s - (self.offline_s - record.offline_s)
            record.offline_s = self.offline_s
            self._ttft_s[_class(record.online)] += self.now_s - record.arrival_s

    def finished(self, request: Any) -> None:
        """Note the end of a request; one that was aborted says nothing about SLOs."""
        record = served(request)
        if record is None or record.first_token_s is None:
            return
        if request.status.name in ("FINISHED_ABORTED", "FINISHED_ERROR"):
            return
        name = _class(record.online)
        further = request.num_output_tokens - 1
        tpot_s = (self.now_s - record.first_token_s) / further if further > 0 else 0.0
        self._counts["requests_finished", name] += 1
        self._tpot_s[name] += tpot_s
        if record.online:
            met = record.first_token_s <= record.first_due_s and tpot_s <= record.tpot_s
            self._slo_met += met
            self.attainment += _RECENT * (met - self.attainment)
            added_s = (self.offline_s - record.offline_s) / further if further > 0 else 0.0
            alone = record.first_alone_s <= record.first_due_s and tpot_s - added_s <= record.tpot_s
            if met or alone:
                self._relative_attainment += _RECENT * (met - self._relative_attainment)
                self._attained_s = self.now_s

    def relative_attainment(self, now_s: float) -> float:
        """The share of recent online requests that met both SLOs, of those that offline work let.

        Who would have missed them also without the time that it added to steps is not counted.
        Misses fade within minutes.
        """
        left = math.exp(-max(0.0, now_s - self._attained_s) / _FORGET_S)
        return 1.0 - (1.0 - self._relative_attainment) * left

    def samples(
        self, queues: Sequence[Any], running: Iterable[Any], step_time: StepTime
    ) -> list[Sample]:
        """All of it, under the names of :data:`METRICS`."""
        samples = []
        running_online = [is_online(request) for request in running]
        for kind in ServiceClass:
            online, label = kind is ServiceClass.ONLINE, (kind.value,)
            waiting = sum(queue.count(online) for queue in queues)
            samples += [
                Sample("scheduler_requests_waiting", waiting, label),
                Sample("scheduler_requests_running", running_online.count(online), label),
                Sample("scheduler_ttft_seconds", self._ttft_s[kind.value], label),
                Sample("scheduler_tpot_seconds", self._tpot_s[kind.value], label),
            ]
            for name in ("requests", "requests_finished", "held", "preempted"):
                value = self._counts[name, kind.value]
                samples.append(Sample(f"scheduler_{name}", value, label))
        samples += [
            Sample("scheduler_late_steps", self._late[reason], (reason.value,)) for reason in Late
        ]
        target_ms = self._plan.target_ms
        bound = 0.0 < target_ms < math.inf
        return [
            *samples,
            Sample("scheduler_slo_met", self._slo_met),
            Sample("scheduler_attainment_ratio", self.attainment),
            Sample("scheduler_slack_seconds", target_ms / 1e3 if bound else 0.0),
            Sample(
                "scheduler_budget_used_ratio", self._plan.planned_ms / target_ms if bound else 0.0
            ),
            Sample("scheduler_step_time_error_ratio", step_time.error),
            Sample("scheduler_steps", self._steps),
            Sample("scheduler_policy_seconds", self._policy_s),
        ]


def _class(online: bool) -> str:
    kind = ServiceClass.ONLINE if online else ServiceClass.OFFLINE
    return str(kind.value)
