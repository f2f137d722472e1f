"""What holds for every plan of the elastic policy, whatever it is shown."""

from __future__ import annotations

import math

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import (
    OfflineDecodes,
    OnlineDecodes,
    PrefillView,
    StepPlan,
    StepView,
    Victim,
)

NOW_S = 50.0
COLD_TOKENS = 64
SECTION = SchedulerSection()
SOME = settings(max_examples=50)  # a whole step takes long to draw

# Instant to slow; a chunk of 1000 tokens takes up to a second.
READY_TIMES = st.builds(
    StepTime,
    base=st.sampled_from([0.0, 5.0, 40.0]),
    token=st.floats(0.0, 1.0),
    square=st.sampled_from([0.0, 1e-4]),
    cross=st.sampled_from([0.0, 1e-6]),
    decode=st.floats(0.0, 5.0),
    context=st.sampled_from([0.0, 1e-4]),
    experts=st.sampled_from([0.0, 0.0, 20.0]),
    idle_experts=st.sampled_from([0.5, 0.97]),
    error=st.sampled_from([0.0, 0.2, 1.0]),
    ready=st.just(True),
    most_prefill_tokens=st.sampled_from([0, 100, 4096]),
)
TIMES = st.one_of(st.just(StepTime()), READY_TIMES)
# Free, or so slow that the time of a step overflows.
ANY_COST = st.one_of(st.sampled_from([0.0, 1e150, 1e300]), st.floats(0.0, 1e308))
EXTREME_TIMES = st.builds(
    StepTime,
    *[ANY_COST] * 7,
    idle_experts=st.floats(0.0, 1.0),
    error=st.floats(0.0, 1.0),
    ready=st.booleans(),
    most_prefill_tokens=st.integers(0, 1 << 20),
)
DUE_S = st.floats(-0.5, 5.0)
TPOTS_MS = st.sampled_from([20.0, 100.0])
CONTEXTS = st.integers(0, 8000)


ONLINE_DECODES = st.tuples(DUE_S, st.integers(0, 99), TPOTS_MS, st.integers(1, 5), CONTEXTS)
OFFLINE_DECODES = st.tuples(CONTEXTS, st.integers(1, 5))
PROMPTS = st.tuples(
    st.booleans(),  # online
    st.booleans(),  # running
    DUE_S,
    st.integers(2, 4000),  # new tokens
    CONTEXTS,
    st.integers(1, 300),  # blocks
)
RECENT_DEMAND = st.sampled_from([(0.0, 0.0, 0.0), (100.0, 100.0, 0.5), (5000.0, 10.0, 10.0)])
IDLE_S = st.sampled_from([0.0, 0.5, 100.0])
NEVER_IDLE = st.just(0.0)  # so that nothing is owed to offline work


def online_decodes(rows: list[tuple[float, int, float, int, int]]) -> OnlineDecodes:
    """Each may come with speculative tokens."""
    shape = StepShape()
    for _, _, _, tokens, context in rows:
        shape = shape.with_chunk(tokens, context)
    return OnlineDecodes(
        [NOW_S + due_s for due_s, *_ in rows],
        [produced for _, produced, *_ in rows],
        [tpot_ms for _, _, tpot_ms, *_ in rows],
        shape,
        shape.tokens,
    )


def offline_decodes(rows: list[tuple[int, int]]) -> OfflineDecodes:
    names = [f"decode{i}" for i in range(len(rows))]
    return OfflineDecodes(names, [context for context, _ in rows], [tokens for _, tokens in rows])


def prompts(
    rows: list[tuple[bool, bool, float, int, int, int]], chunked: bool
) -> list[PrefillView]:
    return [
        PrefillView(
            request_id=f"prompt{index}",
            online=online,
            running=running,
            due_s=NOW_S + due_s if online else math.inf,
            new_tokens=tokens,
            context_tokens=context if running else 0,
            splittable=chunked,
            blocks=0 if running else blocks,
        )
        for index, (online, running, due_s, tokens, context, blocks) in enumerate(rows)
    ]


@st.composite
def views(
    draw: st.DrawFn,
    *,
    times: st.SearchStrategy[StepTime] = TIMES,
    idle_s: st.SearchStrategy[float] = IDLE_S,
) -> StepView:
    """Any step. Without chunked prefill a prompt fits into the budget."""
    chunked = draw(st.booleans())
    offline = offline_decodes(draw(st.lists(OFFLINE_DECODES, max_size=4)))
    shown = prompts(draw(st.lists(PROMPTS, max_size=5)), chunked)
    prompt_tokens, output_tokens, rate = draw(RECENT_DEMAND)
    victims: list[Victim] = []
    if any(r.online and not r.running for r in shown) and draw(st.booleans()):
        running = [*offline.ids, *(r.request_id for r in shown if r.running and not r.online)]
        sizes = draw(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 300)), max_size=4))
        victims = [Victim(name, *size) for name, size in zip(running, sizes, strict=False)]
    return StepView(
        start_s=NOW_S,
        max_tokens=draw(st.integers(40 if chunked else 4040, 8192)),
        step_time=draw(times),
        online=online_decodes(draw(st.lists(ONLINE_DECODES, max_size=4))),
        offline=offline,
        prefills=[r for r in shown if r.running],
        waiting=sorted((r for r in shown if not r.running), key=lambda r: not r.online),
        can_cap=draw(st.booleans()),
        in_flight=draw(st.booleans()),
        offline_idle_s=draw(idle_s),
        free_slots=draw(st.integers(0, 4)),
        free_blocks=draw(st.sampled_from([0, 100, 1 << 30])),
        headroom_blocks=draw(st.sampled_from([0, 50])),
        online_prompt_tokens=prompt_tokens,
        online_output_tokens=output_tokens,
        online_rate=rate,
        victims=victims,
    )


def plan(view: StepView) -> StepPlan:
    return ElasticPolicy(SECTION).plan(view)


def is_busy(view: StepView) -> bool:
    return bool(view.online.due_s) or any(r.online for r in (*view.prefills, *view.waiting))


def decode_tokens(view: StepView, found: StepPlan) -> dict[str, int]:
    """What each offline decode computes in this step."""
    out = {*found.held, *found.preempt}
    offline = view.offline
    return {
        name: 0 if name in out else tokens
        for name, tokens in zip(offline.ids, offline.new_tokens, strict=True)
    }


def prompt_tokens(request: PrefillView, found: StepPlan) -> int:
    """What a running prompt may compute in this step."""
    if request.request_id in found.held or request.request_id in found.preempt:
        return 0
    return found.chunk_tokens.get(request.request_id, request.new_tokens)


def offline_tokens(view: StepView, found: StepPlan) -> int:
    running = [r for r in view.prefills if not r.online]
    return sum(decode_tokens(view, found).values()) + sum(prompt_tokens(r, found) for r in running)


@SOME
@given(views(times=st.one_of(TIMES, EXTREME_TIMES), idle_s=st.floats(0.0, 1e9)))
def test_a_plan_is_made_for_every_step(view: StepView) -> None:
    found = plan(view)
    assert not math.isnan(found.target_ms)


@SOME
@given(views())
def test_the_budget_is_never_above_vllms_own_and_never_nothing(view: StepView) -> None:
    assert 1 <= plan(view).max_tokens <= view.max_tokens


@SOME
@given(views())
def test_only_running_offline_requests_are_held(view: StepView) -> None:
    running = {r.request_id for r in view.prefills if not r.online}
    assert plan(view).held <= running | set(view.offline.ids)


@SOME
@given(views())
def test_every_online_decode_takes_part_whole(view: StepView) -> None:
    # Decodes are neither held nor capped by any plan, so what they need is a budget.
    found = plan(view)
    assert found.max_tokens >= view.online.tokens
    assert found.chunk_tokens.keys() <= {r.request_id for r in (*view.prefills, *view.waiting)}


@SOME
@given(views())
def test_a_cap_is_below_what_the_request_wants(view: StepView) -> None:
    wanted = {r.request_id: r.new_tokens for r in (*view.prefills, *view.waiting)}
    for request_id, tokens in plan(view).chunk_tokens.items():
        assert 0 <= tokens < wanted[request_id]


@SOME
@given(views())
def test_only_running_requests_are_capped_to_nothing(view: StepView) -> None:
    # What is left of the budget is not a waiting request's anyway.
    found = plan(view)
    capped = {name for name, tokens in found.chunk_tokens.items() if not tokens}
    assert capped <= {r.request_id for r in view.prefills}


@SOME
@given(views())
def test_the_budget_covers_all_running_requests_that_take_part(view: StepView) -> None:
    found = plan(view)
    used = view.online.tokens + sum(decode_tokens(view, found).values())
    if view.can_cap:
        # An online prompt that only the budget bounds has no cap.
        ours = [r for r in view.prefills if not r.online]
        used += sum(prompt_tokens(r, found) for r in ours)
    assert used <= found.max_tokens


@SOME
@given(views())
def test_something_always_runs(view: StepView) -> None:
    found = plan(view)
    assume(view.online.due_s or view.offline.ids or view.prefills or view.waiting)
    assert (
        view.online.tokens
        or any(decode_tokens(view, found).values())
        or any(prompt_tokens(r, found) for r in view.prefills)
        or any(r.online for r in view.waiting)
        or (found.admit_offline and any(not r.online for r in view.waiting))
    )


@SOME
@given(views(times=READY_TIMES))
def test_offline_work_makes_a_step_late_only_where_the_plan_says_so(view: StepView) -> None:
    view = view._replace(waiting=(), victims=())
    assume(is_busy(view))
    found = plan(view)
    if found.late is None and offline_tokens(view, found):
        assert found.planned_ms <= found.target_ms + 1e-6


@SOME
@given(views(times=READY_TIMES, idle_s=NEVER_IDLE))
def test_offline_work_that_ran_just_now_makes_no_step_late(view: StepView) -> None:
    view = view._replace(waiting=(), victims=())
    assume(is_busy(view))
    found = plan(view)
    if offline_tokens(view, found):
        assert found.planned_ms <= found.target_ms + 1e-6


@SOME
@given(views(times=READY_TIMES))
def test_a_step_takes_as_long_as_planned(view: StepView) -> None:
    view = view._replace(waiting=(), victims=(), can_cap=True)
    found = plan(view)
    assume(found.planned_ms)
    shape = view.online.shape
    computed = decode_tokens(view, found)
    contexts = zip(view.offline.ids, view.offline.context_tokens, strict=True)
    # Drafted tokens of offline requests count as decodes, which the policy prices by their number.
    assume(all(tokens <= 1 for tokens in computed.values()))
    for name, context in contexts:
        shape = shape.with_chunk(computed[name], context)
    left = found.max_tokens - view.online.tokens - sum(computed.values())
    for request in view.prefills:
        tokens = min(prompt_tokens(request, found), left)
        shape = shape.with_chunk(tokens, request.context_tokens)
        left -= tokens
    assert math.isclose(view.step_time.step_ms(shape), found.planned_ms, rel_tol=1e-6)


@SOME
@given(views(times=READY_TIMES))
def test_without_online_work_every_offline_decode_runs(view: StepView) -> None:
    found = plan(
        view._replace(
            online=OnlineDecodes(),
            prefills=[r for r in view.prefills if not r.online],
            waiting=[r for r in view.waiting if not r.online],
            victims=(),
        )
    )
    assert not found.held & set(view.offline.ids)


@SOME
@given(views(times=st.just(StepTime()), idle_s=NEVER_IDLE))
def test_a_model_that_knows_nothing_bounds_the_offline_prompts_of_a_step(view: StepView) -> None:
    assume(view.offline.ids or any(not r.online for r in (*view.prefills, *view.waiting)))
    found = plan(view)
    assume(found != StepPlan(view.max_tokens))
    shown = (*view.prefills, *view.waiting)
    others = view.online.tokens + sum(view.offline.new_tokens)
    others += sum(r.new_tokens for r in shown if r.online)
    # A step is never empty, and a prompt that cannot be split then runs whole.
    whole = max((r.new_tokens for r in shown if not (r.online or r.splittable)), default=0)
    assert found.max_tokens <= others + (0 if is_busy(view) else max(COLD_TOKENS, whole))


@SOME
@given(views())
def test_a_prompt_that_cannot_be_split_runs_whole_or_not_at_all(view: StepView) -> None:
    found = plan(view)
    for request in (*view.prefills, *view.waiting):
        if not request.splittable:
            assert found.chunk_tokens.get(request.request_id, 0) == 0


@SOME
@given(views(), st.integers(1, 60))
def test_offline_requests_are_admitted_only_where_their_kv_fits(view: StepView, free: int) -> None:
    view = view._replace(free_blocks=free, headroom_blocks=0, prefills=(), offline_idle_s=0.0)
    assume(view.offline.ids or view.online.due_s)
    first = next((r for r in view.waiting if not r.online), None)
    needed = sum(r.blocks for r in view.waiting if r.online)
    found = plan(view)
    if first is not None and needed + first.blocks > free and found.max_tokens < view.max_tokens:
        assert not found.admit_offline


@SOME
@given(views())
def test_victims_suffice_and_none_is_needless(view: StepView) -> None:
    gone = plan(view).preempt
    blocks = {victim.request_id: victim.blocks for victim in view.victims}
    assert len(set(gone)) == len(gone)
    assert set(gone) <= blocks.keys()
    if not gone:
        return
    first = next(r for r in view.waiting if r.online)

    def suffice(names: list[str]) -> bool:
        free = view.free_blocks + sum(blocks[name] for name in names)
        return view.free_slots + len(names) >= 1 and free >= first.blocks

    assert suffice(list(gone))
    for name in gone:
        assert not suffice([other for other in gone if other != name])


@SOME
@given(views())
def test_who_is_preempted_is_neither_held_nor_given_tokens(view: StepView) -> None:
    found = plan(view)
    gone = set(found.preempt)
    assert not gone & (found.held | found.chunk_tokens.keys())
    assert not (gone and found.admit_offline)
