"""The elastic scheduler: a mixin over whatever scheduler class vLLM would have used.

Each step it shows the policy a snapshot, applies the plan with vLLM's own levers, lets vLLM
schedule, and puts everything back. Between steps all state is as vLLM left it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.request import Request

from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
from xllm_plugins.compat import scheduler_levers as levers
from xllm_plugins.config import parse_section
from xllm_plugins.errors import ConfigError
from xllm_plugins.latency import StepShape, StepTime, StepTimeModel
from xllm_plugins.manager import registry
from xllm_plugins.status import Report, register_reporter
from xllm_plugins.steps import StepClock
from xllm_scheduler.classes import classify
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine import views
from xllm_scheduler.engine.books import Books, Demand, Served, due_s, is_online
from xllm_scheduler.engine.policy import StepPlan, StepView
from xllm_scheduler.engine.profiles import Profile, profile_key
from xllm_scheduler.engine.queues import ClassQueue, DeadlineLane
from xllm_scheduler.plugin import POLICY_KIND

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object

logger = logging.getLogger("vllm.xllm_scheduler")

_GENERATES = "decode"  # the role of an instance that is there to generate
_WINDOW = 256  # how many waiting requests of a class a step looks at


class ElasticMixin(_Base):  # type: ignore[misc]
    """See the module; comes before vLLM's scheduler class in the bases.

    Attributes:
        wall_clock: has ``monotonic()`` and ``time()``; a simulation puts its own here.
        role: what a router gives this instance to do: ``prefill``, ``decode`` or ``mixed``.
        policy_failure: what the step policy raised; empty as long as it did not.
    """

    wall_clock: Any = time
    role = "mixed"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        values = self.vllm_config.additional_config[SETTINGS_KEY]["scheduler"]
        section = parse_section(SchedulerSection, "scheduler", values)
        assert isinstance(section, SchedulerSection)
        self._section = section
        self._policy = registry().policy(POLICY_KIND, section.policy).factory(section)
        self.policy_failure = ""
        self._can_cap = levers.Lever.CHUNK in levers.effective_levers(_base_of(type(self)))
        self._model = StepTimeModel(levers.idle_experts(self.vllm_config))
        self._profile = Profile(
            section.profile, section.profile_dir, profile_key(self.vllm_config), self._model
        )
        self._clock = StepClock(self._model)
        self._queues: list[ClassQueue] = levers.replace_waiting_queues(self, self._class_queue)
        self._chunk_tokens: Mapping[str, int] = {}
        self._shown_waiting: list[Request] = []
        self._looked_at: views.Running | None = None
        self._hide_waiting = False
        self._first_token_pending: dict[str, Request] = {}
        self._offline_here = False
        self._offline_ran_s = (
            self.wall_clock.monotonic()
        )  # when offline work was last computed, or there was none
        self._demand = Demand()
        self._books = Books()
        register_reporter("scheduler", self.xllm_report)

    @property
    def step_time(self) -> StepTime:
        """How long steps take, as learned so far."""
        return self._model.current

    def add_request(self, request: Request) -> None:
        """Classify the request, then let vLLM queue it."""
        # What continues a streaming session is no request of its own: see below.
        if request.request_id not in self.requests:
            self._take_in(request)
            if levers.by_priority(self):
                # vLLM preempts by this number alone; no online request may be its first choice.
                most, own = self._section.offline_above_priority, request.priority
                request.priority = min(own, most) if is_online(request) else max(own, most + 1)
        super().add_request(request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)
        self._take_in(session)
        self._first_token_pending[session.request_id] = session

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Shape the step by the policy's plan, let vLLM schedule it, and restore."""
        began_s = self.wall_clock.monotonic()
        plan = self._plan(began_s)
        self._books.planned(plan, self.wall_clock.monotonic() - began_s)
        if plan.preempt:
            gone = [r for r in self.running if r.request_id in plan.preempt]
            levers.preempt(self, reversed(gone), began_s)
        if plan.held:
            for request in self.running:
                if request.request_id in plan.held:
                    levers.hold(self, request)
                    self._books.count("held", request)
        if plan.chunk_tokens and self._can_cap:
            self._chunk_tokens = plan.chunk_tokens
            self._reserve_prefill_lookahead = self._capped_chunk  # only now: it is called often
        for queue in self._queues:
            queue.offline_open = plan.admit_offline
        try:
            with (
                levers.token_budget(self, plan.max_tokens),
                levers.reserved_loras(self, lambda r: self._sits_out(r, plan)),
            ):
                output = super().schedule(*args, **kwargs)
        finally:
            if self._chunk_tokens:
                self._chunk_tokens = {}
                del self._reserve_prefill_lookahead
            for queue in self._queues:
                queue.offline_open = True
        throttled = bool(args[0] if args else kwargs.get("throttle_prefills"))
        self._launched(output, plan, throttled)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn from the step that ended, then let vLLM take in its tokens."""
        now_s = self.wall_clock.monotonic()
        self._clock.ended(id(scheduler_output), now_s)
        self._books.now_s, self._books.offline_s = now_s, self._clock.offline_s
        result = super().update_from_output(scheduler_output, model_runner_output)
        pending = self._first_token_pending
        for request in [r for r in pending.values() if r.num_output_tokens]:
            del pending[request.request_id]
            self._books.first_token(request)
        self._profile.save_sometimes()
        return result

    def shutdown(self) -> None:
        """Save what was learned, then let vLLM shut down."""
        self._profile.save()
        super().shutdown()

    def xllm_report(self) -> Report:
        """Counts by class and the latency model, for metrics and ``/xllm/v1/status``."""
        samples = self._books.samples(self._queues, self.running, self._model.current)
        facts = {
            "policy": self._section.policy,
            "policy_failure": self.policy_failure,
            "step_time_ms": self._model.saved().get("step_time_ms", {}),
            "steps_learned_from": self._model.steps,
            "profile": self._profile.origin,
        }
        return Report(samples, facts)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._books.count("preempted", request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._first_token_pending.pop(request.request_id, None) and request.num_output_tokens:
            self._books.first_token(request)
        self._books.finished(request)
        if is_online(request) and request.status.name != "FINISHED_ABORTED":
            self._demand.finished(request.num_output_tokens)
        return super()._free_request(request, *args, **kwargs)

    def _capped_chunk(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        # vLLM asks this for every chunk, running or waiting: the one place to cap a single one.
        cap = self._chunk_tokens.get(request.request_id, num_new_tokens)
        tokens: int = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, min(num_new_tokens, cap)
        )
        return tokens

    def _class_queue(self, new_lane: Any) -> ClassQueue:
        # Under vLLM's priority policy online requests keep the order that their priorities give.
        lane = new_lane()
        online = DeadlineLane(due_s) if isinstance(lane, deque) else lane
        return ClassQueue(online, new_lane(), is_online)

    @staticmethod
    def _sits_out(request: Request, plan: StepPlan) -> bool:
        return request.request_id in plan.held or plan.chunk_tokens.get(request.request_id) == 0

    def _take_in(self, request: Request) -> Served:
        params = request.sampling_params
        xargs = (params.extra_args or {}) if params is not None else {}
        try:
            service = classify(xargs, request.priority, self._section)
        except ConfigError as error:
            # The API server has refused such a request; one from vllm.LLM is served as online.
            logger.warning("request %s: %s It is served as online.", request.request_id, error)
            service = classify({}, 0, self._section)
        now_s = self.wall_clock.monotonic()
        if service.online:
            self._demand.arrived(request.num_prompt_tokens, now_s)
        arrival_s = now_s - max(0.0, self.wall_clock.time() - request.arrival_time)
        record = Served.of(service, arrival_s, self._clock.offline_s)
        request.xllm = record
        self._books.count("requests", request)
        return record

    def _plan(self, now_s: float) -> StepPlan:
        plain = StepPlan(self.max_num_scheduled_tokens)
        self._shown_waiting, self._looked_at = [], None
        if self.policy_failure:
            return plain
        try:
            view = self._view(now_s)
            if view is None:
                return plain
            plan: StepPlan = self._policy.plan(view)
            return self._without_waiting(plan, view) if self._hide_waiting else plan
        except Exception as error:
            self.policy_failure = f"{type(error).__name__}: {error}"
            logger.exception("The step policy failed; from now on vLLM schedules alone.")
            return plain

    def _without_waiting(self, plan: StepPlan, view: StepView) -> StepPlan:
        running = view.online.tokens + sum(view.offline.new_tokens)
        running += sum(request.new_tokens for request in view.prefills)
        most = max(1, min(plan.max_tokens, running))
        return plan._replace(max_tokens=most, admit_offline=False)

    def _view(self, now_s: float) -> StepView | None:
        """What the policy decides on; None if there is nothing to decide."""
        start_s = self._clock.next_start_s(now_s)
        running = self._looked_at = views.running(self.running, start_s, self._take_in)
        if not running.in_order:
            # vLLM serves the first first and preempts the last first. By priority, it must find
            # its victims behind those that it has scheduled in the same step.
            if levers.by_priority(self):
                self.running.sort(key=lambda r: (r.priority, r.arrival_time))
            else:
                self.running.sort(key=is_online, reverse=True)
        self._offline_here = running.any_offline or any(q.count(False) for q in self._queues)
        if not self._offline_here:
            self._offline_ran_s = now_s
        slots, blocks = levers.free_slots(self), levers.free_blocks(self)
        if not (self._offline_here or running.prefills or slots > 0):
            return None
        for queue in self._queues:
            queue.turn(now_s)
        # Without a slot only the request for which others are preempted matters.
        if slots > 0 or (running.any_offline and self._head_is_urgent(start_s)):
            self._shown_waiting = self._first_waiting(slots)
        waiting = [views.waiting_prefill(self, r) for r in self._shown_waiting]
        lacks = bool(waiting) and (slots < 1 or blocks < waiting[0].blocks)
        preempts = (
            lacks and running.any_offline and self._is_urgent(self._shown_waiting[0], start_s)
        )
        return StepView(
            start_s=start_s,
            max_tokens=self.max_num_scheduled_tokens,
            step_time=self._model.current,
            online=running.online,
            offline=running.offline,
            prefills=[views.running_prefill(self, r) for r in running.prefills],
            waiting=waiting,
            can_cap=self._can_cap,
            in_flight=self._clock.in_flight,
            offline_idle_s=now_s - self._offline_ran_s,
            free_slots=slots,
            free_blocks=blocks,
            headroom_blocks=len(self.running) + self._demand.prompt_blocks(self.block_size),
            online_prompt_tokens=self._demand.prompt_tokens,
            online_output_tokens=self._demand.output_tokens,
            online_rate=self._demand.rate(now_s),
            relative_attainment=self._books.relative_attainment(now_s),
            hurries=self.role != _GENERATES,
            victims=views.victims(self) if preempts else (),
        )

    def _head_is_urgent(self, start_s: float) -> bool:
        heads = chain(levers.kv_holding(self), *(q.head(True, 1) for q in self._queues))
        return any(self._is_urgent(request, start_s) for request in heads)

    def _is_urgent(self, request: Request, start_s: float) -> bool:
        if not is_online(request):
            return False
        slack_ms = (due_s(request) - start_s) * 1e3
        new_tokens = request.num_tokens - request.num_computed_tokens
        return bool(self._policy.is_urgent(slack_ms, new_tokens, self._model.current))

    def _first_waiting(self, free_slots: int) -> list[Request]:
        if self._hide_waiting or levers.is_paused(self):
            return []
        shown: list[Request] = []
        holding = [r for r in levers.kv_holding(self) if levers.is_ready(self, r)]
        for online in (True, False):
            shown += [r for r in holding if is_online(r) is online]
            # One that finds no slot is shown as well: others may be preempted for it.
            most = min(_WINDOW, max(int(online), free_slots - len(shown)))
            if most < 1:
                continue
            tokens = self.max_num_scheduled_tokens
            for queue in self._queues:
                for request in queue.head(online, most):
                    if tokens > 0 and levers.is_ready(self, request):
                        shown.append(request)
                        tokens -= request.num_tokens - request.num_computed_tokens
        return shown

    def _launched(self, output: Any, plan: StepPlan, throttled: bool) -> None:
        for new in output.scheduled_new_reqs:
            self._first_token_pending[new.req_id] = self.requests[new.req_id]
        # No slot, no KV, a grammar that is not ready: what the plan set aside for waiting requests
        # came to nothing, and running ones were cut for it. The next step is planned without them;
        # otherwise each could wait for the other for ever.
        self._hide_waiting = False
        cut = bool(plan.held or plan.chunk_tokens) and bool(self.running)
        if cut and not throttled and output.total_num_scheduled_tokens < plan.max_tokens:
            let_in = [r for r in self._shown_waiting if plan.admit_offline or is_online(r)]
            ready = [levers.is_ready(self, request) for request in let_in]
            self._hide_waiting = bool(ready) and all(ready)
        shape, online = self._computed(output)
        now_s = self.wall_clock.monotonic()
        if online is not None:
            self._offline_ran_s = now_s
        self._clock.launched(id(output), shape, now_s, online)

    def _computed(self, output: Any) -> tuple[StepShape, StepShape | None]:
        """What a step computes, and what of it for online requests if there is offline work."""
        scheduled, running = output.num_scheduled_tokens, self._looked_at
        if running is not None and running.decodes and not output.scheduled_new_reqs:
            count = running.decodes.decodes
            if len(scheduled) == count == output.total_num_scheduled_tokens:
                # The usual step: all that ran before, with a token each.
                return running.decodes, running.online.shape if running.any_offline else None
        shape = online = StepShape()
        count = context = offline_count = offline_context = 0
        offline_here, offline_ran = self._offline_here, False
        for request_id, tokens in scheduled.items():
            request = self.requests[request_id]
            # vLLM has already advanced it by the tokens of this step.
            computed = max(0, request.num_computed_tokens - tokens)
            offline = offline_here and not is_online(request)
            offline_ran = offline_ran or offline
            if tokens == 1:
                count += 1
                context += computed
                if offline:
                    offline_count += 1
                    offline_context += computed
                continue
            shape = shape.with_chunk(tokens, computed)
            if not offline:
                online = online.with_chunk(tokens, computed)
        shape = shape.with_decodes(count, context)
        if not offline_ran:
            return shape, None
        return shape, online.with_decodes(count - offline_count, context - offline_context)


def _base_of(cls: type) -> type:
    mro = cls.__mro__
    return mro[mro.index(ElasticMixin) + 1]


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
