"""The elastic scheduler: a mixin over whatever scheduler class vLLM would have used.

Each step it shows the policy a snapshot, applies the plan with vLLM's own levers, lets vLLM
schedule, and puts everything back. Between steps all state is as vLLM left it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.request import Request

from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
from xllm_plugins.compat.scheduler_levers import (
    Lever,
    effective_levers,
    hold,
    replace_waiting_queues,
    token_budget,
)
from xllm_plugins.config import parse_section
from xllm_plugins.errors import ConfigError
from xllm_plugins.latency import StepTimeModel
from xllm_plugins.manager import registry
from xllm_plugins.metrics import Sample
from xllm_plugins.status import Report, register_reporter
from xllm_scheduler.classes import Service, ServiceClass, classify
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.policy import RequestView, StepPlan, StepView
from xllm_scheduler.engine.queues import ClassQueue
from xllm_scheduler.engine.steps import StepClock
from xllm_scheduler.plugin import POLICY_KIND

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object

logger = logging.getLogger("vllm.xllm_scheduler")

_PROMPT_WEIGHT = 0.1  # of the newest online prompt in the mean of recent ones
_ONLINE_WINDOW, _OFFLINE_WINDOW = 32, 8  # how many waiting requests of a class a step looks at


@dataclass
class Served:
    """What the scheduler remembers of one request, attached to it as ``request.xllm``."""

    service: Service
    arrival_s: float
    first_token_s: float | None = None


def served(request: Request) -> Served | None:
    """The record of a request; None if it never came through ``add_request``."""
    found: Served | None = getattr(request, "xllm", None)
    return found


def is_online(request: Request) -> bool:
    """Whether a request has SLOs; one that we know nothing of is treated as online."""
    record = served(request)
    return record is None or record.service.online


class ElasticMixin(_Base):  # type: ignore[misc]
    """See the module; comes before vLLM's scheduler class in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        values = self.vllm_config.additional_config[SETTINGS_KEY]["scheduler"]
        section = parse_section(SchedulerSection, "scheduler", values)
        assert isinstance(section, SchedulerSection)
        self._section = section
        self._policy = registry().policy(POLICY_KIND, section.policy).factory(section)
        self._policy_failure = ""
        self._can_cap = Lever.CHUNK in effective_levers(type(self).__mro__[2])
        self._model = StepTimeModel()
        self._clock = StepClock(self._model)
        self._queues: list[ClassQueue] = replace_waiting_queues(
            self, lambda new_lane: ClassQueue(new_lane, is_online)
        )
        self._chunk_tokens: dict[str, int] = {}
        self._shown_waiting: list[Request] = []
        self._hide_waiting = False
        self._online_prompt_tokens = 0.0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._policy_seconds = 0.0
        register_reporter("scheduler", self.xllm_report)

    def add_request(self, request: Request) -> None:
        """Classify the request, then let vLLM queue it."""
        if served(request) is None:
            request.xllm = self._served(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Shape the step by the policy's plan, let vLLM schedule it, and restore."""
        began_s = time.monotonic()
        self.running.sort(key=lambda r: not is_online(r))
        plan = self._plan(began_s)
        self._policy_seconds += time.monotonic() - began_s
        for request in self.running:
            if request.request_id in plan.held:
                hold(self, request)
                self._counts["held", _class_of(request)] += 1
        self._chunk_tokens = dict(plan.chunk_tokens)
        for queue in self._queues:
            queue.offline_open = plan.admit_offline
        try:
            with token_budget(self, plan.max_tokens):
                output = super().schedule(*args, **kwargs)
        finally:
            self._chunk_tokens = {}
            for queue in self._queues:
                queue.offline_open = True
        self._hide_waiting = self._admitted_none(output.num_scheduled_tokens, plan)
        self._clock.launched(id(output), self._chunks(output), time.monotonic())
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn from the step that ended, then let vLLM take in its tokens."""
        now_s = time.monotonic()
        self._clock.ended(id(scheduler_output), now_s)
        result = super().update_from_output(scheduler_output, model_runner_output)
        for request in self.running:
            record = served(request)
            if record is not None and record.first_token_s is None and request.num_output_tokens:
                record.first_token_s = now_s
        return result

    def xllm_report(self) -> Report:
        """Counts by class and the latency model, for metrics and ``/xllm/v1/status``."""
        samples = []
        for kind in ServiceClass:
            online = kind is ServiceClass.ONLINE
            waiting = sum(queue.count(online) for queue in self._queues)
            running = sum(is_online(r) is online for r in self.running)
            samples += [
                Sample("scheduler_requests_waiting", waiting, (kind.value,)),
                Sample("scheduler_requests_running", running, (kind.value,)),
            ]
            for name in ("requests", "held", "preempted"):
                value = self._counts[name, kind.value]
                samples.append(Sample(f"scheduler_{name}", value, (kind.value,)))
        step_time = self._model.current
        samples += [
            Sample("scheduler_step_time_error_ratio", step_time.error),
            Sample("scheduler_policy_seconds", self._policy_seconds),
        ]
        facts = {
            "policy": self._section.policy,
            "policy_failure": self._policy_failure,
            "step_time_ms": dataclasses.asdict(step_time),
            "steps_learned_from": self._model.steps,
        }
        return Report(samples, facts)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._counts["preempted", _class_of(request)] += 1
        super()._preempt_request(request, *args, **kwargs)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this for every chunk, running or waiting: the one place to cap a single one.
        cap = self._chunk_tokens.get(request.request_id, num_new_tokens)
        tokens: int = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, min(num_new_tokens, cap)
        )
        return tokens

    def _served(self, request: Request) -> Served:
        params = request.sampling_params
        xargs = (params.extra_args or {}) if params is not None else {}
        try:
            service = classify(xargs, request.priority, self._section)
        except ConfigError as error:
            # The API server has refused such a request; one from vllm.LLM is served as online.
            logger.warning("request %s: %s It is served as online.", request.request_id, error)
            service = classify({}, 0, self._section)
        self._counts["requests", service.kind.value] += 1
        if service.online:
            grown = request.num_prompt_tokens - self._online_prompt_tokens
            self._online_prompt_tokens += _PROMPT_WEIGHT * grown
        waited_s = max(0.0, time.time() - request.arrival_time)
        return Served(service, time.monotonic() - waited_s)

    def _plan(self, now_s: float) -> StepPlan:
        plain = StepPlan(self.max_num_scheduled_tokens)
        if self._policy_failure:
            return plain
        try:
            planned: StepPlan = self._policy.plan(self._view(now_s))
        except Exception as error:
            self._policy_failure = f"{type(error).__name__}: {error}"
            logger.exception("The step policy failed; from now on vLLM schedules alone.")
            return plain
        return planned

    def _admitted_none(self, scheduled: Mapping[str, int], plan: StepPlan) -> bool:
        # No slot, no KV, a grammar that is not ready: what the plan set aside for waiting requests
        # came to nothing, and running ones were held for it. The next step is planned without them;
        # otherwise each could wait for the other for ever.
        let_in = [r.request_id for r in self._shown_waiting if plan.admit_offline or is_online(r)]
        unused = plan.max_tokens - sum(scheduled.values())
        return bool(let_in) and unused > 0 and scheduled.keys().isdisjoint(let_in)

    def _view(self, now_s: float) -> StepView:
        start_s = self._clock.next_start_s(now_s)
        waiting = [
            request
            for online, most in ((True, _ONLINE_WINDOW), (False, _OFFLINE_WINDOW))
            for queue in self._queues
            for request in queue.head(online, most)
            if not self._hide_waiting
        ]
        self._shown_waiting = waiting
        return StepView(
            start_s=start_s,
            max_tokens=self.max_num_scheduled_tokens,
            step_time=self._model.current,
            running=tuple(self._request_view(r, True, start_s) for r in self.running),
            waiting=tuple(self._request_view(r, False, start_s) for r in waiting),
            can_cap=self._can_cap,
            online_prompt_tokens=self._online_prompt_tokens,
        )

    def _request_view(self, request: Request, running: bool, start_s: float) -> RequestView:
        computed = request.num_computed_tokens
        outputs = request.num_output_tokens + request.num_output_placeholders
        new_tokens = request.num_tokens_with_spec + request.num_output_placeholders - computed
        decoding = running and not request.is_prefill_chunk
        online, due_s, tpot_ms = True, start_s, self._section.tpot_ms
        record = served(request)
        if record is not None:
            online, tpot_ms = record.service.online, record.service.tpot_ms
            first_s = record.arrival_s + record.service.ttft_ms / 1e3
            if outputs and record.first_token_s is None:
                first_s = start_s  # the first token is in flight, it comes when that step ends
            elif record.first_token_s is not None:
                first_s = record.first_token_s
            due_s = first_s + outputs * tpot_ms / 1e3
        return RequestView(
            request_id=request.request_id,
            online=online,
            running=running,
            due_s=due_s if online else math.inf,
            new_tokens=max(0, new_tokens),
            context_tokens=computed,
            decoding=decoding,
            tpot_ms=tpot_ms if online else math.inf,
            splittable=self._splittable(request, decoding),
        )

    def _splittable(self, request: Request, decoding: bool) -> bool:
        return not decoding and (
            self.scheduler_config.enable_chunked_prefill
            # Their chunks have borders of their own, which a cap of ours would not respect.
            and not request.has_encoder_inputs
            and not getattr(self, "need_mamba_block_aligned_split", False)
        )

    def _chunks(self, output: Any) -> list[tuple[int, int]]:
        # vLLM has already advanced num_computed_tokens by the tokens of this step.
        return [
            (tokens, max(0, self.requests[request_id].num_computed_tokens - tokens))
            for request_id, tokens in output.num_scheduled_tokens.items()
        ]


def _class_of(request: Request) -> str:
    return "online" if is_online(request) else "offline"


@functools.cache
def elastic_class(base: type) -> type:
    """The elastic scheduler on top of one of vLLM's or a platform's scheduler classes."""
    return type(f"Elastic{base.__name__}", (ElasticMixin, base), {"__doc__": ElasticMixin.__doc__})


def elastic_scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """What vLLM finds as ``scheduler_cls``: builds the scheduler on the class that was attached to.

    The class is looked up here, in the engine process, where all platform patches are in place.
    """
    features = vllm_config.additional_config[REPORT_KEY]["features"]
    base = next(f["attached_to"] for f in features if f["feature"] == "scheduler")
    return elastic_class(resolve_obj_by_qualname(base))(vllm_config=vllm_config, **kwargs)
