"""What holds for every plan of the elastic policy, whatever it is shown."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.policy import ElasticPolicy, RequestView, StepPlan, StepView

NOW_S = 50.0
COLD_TOKENS = 256
SECTION = SchedulerSection()


# Instant to slow; a chunk of 1000 tokens takes up to a second.
READY_TIMES = st.builds(
    StepTime,
    base=st.sampled_from([0.0, 5.0, 40.0]),
    token=st.floats(0.0, 1.0),
    square=st.sampled_from([0.0, 1e-4]),
    cross=st.sampled_from([0.0, 1e-6]),
    decode=st.floats(0.0, 5.0),
    context=st.sampled_from([0.0, 1e-4]),
    error=st.sampled_from([0.0, 0.2, 1.0]),
    ready=st.just(True),
)
TIMES = st.one_of(st.just(StepTime()), READY_TIMES)
REQUESTS = st.tuples(
    st.sampled_from(["running decode", "running prefill", "waiting"]),
    st.floats(-0.5, 5.0),  # due in so many seconds, if online
    st.integers(2, 4000),  # new tokens of a prefill
    st.integers(0, 8000),  # context
)


def request(
    name: str, drawn: tuple[str, float, int, int], *, online: bool, chunked: bool
) -> RequestView:
    state, due_s, prefill, context_tokens = drawn
    decoding = state == "running decode"
    return RequestView(
        request_id=name,
        online=online,
        running=state != "waiting",
        due_s=NOW_S + due_s if online else math.inf,
        # Up to four speculative tokens come with a decode.
        new_tokens=1 + prefill % 5 if decoding else prefill,
        context_tokens=0 if state == "waiting" else context_tokens,
        decoding=decoding,
        tpot_ms=[20.0, 100.0][prefill % 2] if online else math.inf,
        splittable=chunked and not decoding,
    )


@st.composite
def views(
    draw: st.DrawFn,
    *,
    times: st.SearchStrategy[StepTime] = TIMES,
    least_online: int = 0,
    chunked: bool | None = None,
) -> StepView:
    """A step with some offline work. Without chunked prefill a prompt fits into the budget."""
    chunked = draw(st.booleans()) if chunked is None else chunked
    online = draw(st.lists(REQUESTS, min_size=least_online, max_size=4))
    offline = draw(st.lists(REQUESTS, min_size=1, max_size=4))
    all_requests = [
        *(request(f"on{i}", r, online=True, chunked=chunked) for i, r in enumerate(online)),
        *(request(f"off{i}", r, online=False, chunked=chunked) for i, r in enumerate(offline)),
    ]
    return StepView(
        start_s=NOW_S,
        max_tokens=draw(st.integers(40 if chunked else 4000, 8192)),
        step_time=draw(times),
        running=tuple(r for r in all_requests if r.running),
        waiting=tuple(r for r in all_requests if not r.running),
        can_cap=draw(st.booleans()),
        online_prompt_tokens=draw(st.sampled_from([0.0, 100.0, 5000.0])),
    )


def plan(view: StepView) -> StepPlan:
    return ElasticPolicy(SECTION).plan(view)


def tokens_of(running: RequestView, found: StepPlan) -> int:
    """What a running request computes in this step."""
    if running.request_id in found.held:
        return 0
    return found.chunk_tokens.get(running.request_id, running.new_tokens)


@given(views())
def test_the_budget_is_never_above_vllms_own_and_never_nothing(view: StepView) -> None:
    assert 1 <= plan(view).max_tokens <= view.max_tokens


@given(views())
def test_only_running_offline_requests_are_held(view: StepView) -> None:
    assert plan(view).held <= {r.request_id for r in view.running if not r.online}


@given(views())
def test_every_online_decode_takes_part_whole(view: StepView) -> None:
    found = plan(view)
    decodes = [r for r in view.running if r.online and r.decoding]
    assert all(tokens_of(r, found) == r.new_tokens for r in decodes)
    assert found.max_tokens >= sum(r.new_tokens for r in decodes)


@given(views())
def test_a_cap_is_below_what_the_request_wants_and_zero_only_for_a_late_turn(
    view: StepView,
) -> None:
    known = {r.request_id: r for r in (*view.running, *view.waiting)}
    for request_id, tokens in plan(view).chunk_tokens.items():
        one = known[request_id]
        assert 0 <= tokens < one.new_tokens
        if tokens == 0:
            assert (one.online, one.running, one.decoding) == (True, True, False)


@given(views())
def test_the_budget_covers_all_running_requests_that_take_part(view: StepView) -> None:
    found = plan(view)
    assert sum(tokens_of(r, found) for r in view.running) <= found.max_tokens


@given(views())
def test_something_can_always_run(view: StepView) -> None:
    found = plan(view)
    assert (
        any(tokens_of(r, found) for r in view.running)
        or any(r.online for r in view.waiting)
        or (found.admit_offline and any(not r.online for r in view.waiting))
    )


@given(views(times=READY_TIMES, least_online=1))
def test_offline_work_never_makes_the_predicted_step_overrun_an_online_token(
    view: StepView,
) -> None:
    view = replace(view, waiting=())
    assume({True, False} == {r.online for r in view.running})
    found = plan(view)
    if all(not tokens_of(r, found) for r in view.running if not r.online):
        return
    shape = StepShape()
    for one in view.running:
        shape = shape.with_chunk(tokens_of(one, found), one.context_tokens)
    predicted_ms = view.step_time.step_ms(shape)
    assert predicted_ms <= found.target_ms + 1e-6
    for one in view.running:
        if one.online and one.decoding:
            assert predicted_ms <= (one.due_s - NOW_S) * 1e3
            assert predicted_ms <= one.tpot_ms


@given(views(least_online=1), st.floats(0.001, 1.0))
def test_no_offline_work_runs_while_an_online_request_is_late(
    view: StepView, late_s: float
) -> None:
    def late(one: RequestView) -> RequestView:
        return replace(one, due_s=NOW_S - late_s) if one.request_id == "on0" else one

    found = plan(
        replace(
            view, running=tuple(map(late, view.running)), waiting=tuple(map(late, view.waiting))
        )
    )
    assert found.held == {r.request_id for r in view.running if not r.online}
    assert not found.admit_offline


@given(views(times=READY_TIMES))
def test_without_online_work_no_decode_is_held_and_a_step_fills_the_idle_share(
    view: StepView,
) -> None:
    found = plan(
        replace(
            view,
            running=tuple(r for r in view.running if not r.online),
            waiting=tuple(w for w in view.waiting if not w.online),
        )
    )
    assert not found.held & {r.request_id for r in view.running if r.decoding}
    assert found.target_ms == SECTION.idle_step_share * SECTION.ttft_ms


@given(views(times=st.just(StepTime())))
def test_a_model_that_knows_nothing_bounds_the_offline_work_of_a_step(view: StepView) -> None:
    both = (*view.running, *view.waiting)
    online_tokens = sum(r.new_tokens for r in both if r.online)
    offline = [r for r in both if not r.online]
    decode_tokens = sum(r.new_tokens for r in offline if r.decoding)
    whole = max((r.new_tokens for r in offline if not r.splittable), default=0)
    bound = max(decode_tokens + COLD_TOKENS, whole)
    if offline:
        assert plan(view).max_tokens <= online_tokens + bound


@given(views(times=READY_TIMES, chunked=False))
def test_a_prompt_that_cannot_be_split_runs_whole_or_not_at_all(view: StepView) -> None:
    found = plan(view)
    for one in (*view.running, *view.waiting):
        if not one.decoding:
            assert found.chunk_tokens.get(one.request_id, 0) == 0


@given(
    hold_ms=st.floats(50.0, 3000.0),
    step_ms=st.floats(1.0, 100.0),
    late_ms=st.floats(0.0, 1000.0),
    offline_decodes=st.booleans(),
)
def test_a_hold_never_lasts_longer_than_set(
    hold_ms: float, step_ms: float, late_ms: float, offline_decodes: bool
) -> None:
    policy = ElasticPolicy(SchedulerSection(offline_hold_ms=hold_ms))
    time = StepTime(base=5.0, token=0.1, decode=1.0, error=0.1, ready=True)
    now_s, last_run_s = NOW_S, NOW_S
    for _ in range(100):
        late = RequestView("on", True, True, now_s - late_ms / 1e3, 1, 50, True, 100.0, False)
        work = RequestView(
            "off",
            online=False,
            running=True,
            due_s=math.inf,
            new_tokens=1 if offline_decodes else 5000,
            context_tokens=10,
            decoding=offline_decodes,
            splittable=not offline_decodes,
        )
        found = policy.plan(StepView(now_s, 2048, time, running=(late, work)))
        if "off" not in found.held:
            last_run_s = now_s
        # A hold begins with the step after the last one that ran and is looked at once a step.
        assert (now_s - last_run_s) * 1e3 <= hold_ms + 2 * step_ms + 1e-6
        now_s += step_ms / 1e3
