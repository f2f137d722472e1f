"""The virtual cluster: real scheduling, real prefix caching, real preemption, virtual time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from xllm_scheduler.service.aware import KvAware
from xllm_scheduler.service.config import RouterSection, roles_of, routing_of
from xllm_scheduler.service.routing import (
    InstanceView,
    RequestView,
    Role,
    RolePolicy,
    Route,
    RoutingPolicy,
)
from xllm_scheduler.service.staged import least_loaded, round_robin
from xllm_scheduler.simulate.cluster import Cluster
from xllm_scheduler.simulate.engine import Engine
from xllm_scheduler.simulate.generate import Arrivals, Lengths, conversations, requests
from xllm_scheduler.simulate.hardware import LINKS
from xllm_scheduler.simulate.instance import SimulationError
from xllm_scheduler.simulate.members import ClusterSpec, Failure
from xllm_scheduler.simulate.outcomes import Run
from xllm_scheduler.simulate.profiles import find_profile
from xllm_scheduler.simulate.workload import Ask, Slo, Stream

Engines = Callable[..., Engine]
PROFILE = find_profile("h200", "Qwen3-8B", 1)
SLO = Slo(2000.0, 50.0)


def simulate(
    engine: Engine,
    *streams: Stream,
    roles: Sequence[Role] = (Role.MIXED,),
    link: str = "nvlink",
    routing: RoutingPolicy | None = None,
    role_policy: RolePolicy | None = None,
    failures: Sequence[Failure] = (),
    seconds: float | None = None,
    least: float = 0.0,
) -> Run:
    spec = ClusterSpec(roles, LINKS[link], failures=failures)
    cluster = Cluster(spec, engine, PROFILE, routing or least_loaded(), role_policy)
    return cluster.run(streams, seconds=seconds, least=least)


def chat(*asks: Ask) -> Stream:
    return Stream("chat", True, SLO, asks=asks)


def poisson(rate: float, seconds: float = 20.0, prompt: int = 500) -> list[Ask]:
    arrivals = Arrivals(rate)
    return requests(arrivals, Lengths(prompt, 0.5), Lengths(40, 0.5), seconds=seconds, seed=0)


def test_a_request_alone_takes_its_steps(engine: Engines) -> None:
    run = simulate(engine(), chat(Ask(1.0, 1000, 11)))
    (one,) = run.outcomes
    shape = PROFILE.step_time
    prefill_ms = PROFILE.prefill_base_ms or 0.0
    prefill_ms += shape.token * 1000 + shape.square * 1000**2
    assert one.ttft_ms == pytest.approx(prefill_ms)
    decodes = [shape.base + shape.decode + shape.context * (1000 + i) for i in range(10)]
    assert one.tpot_ms == pytest.approx(sum(decodes) / 10)
    assert (one.tokens, one.finished, run.steps) == (11, True, 11)


def test_a_run_ends_when_its_attainment_is_out_of_reach(engine: Engines) -> None:
    easy, hard = chat(*poisson(2.0)), chat(*poisson(60.0, prompt=8000))
    assert simulate(engine(), easy, least=0.9).outcomes == simulate(engine(), easy).outcomes
    whole, ended = simulate(engine(), hard), simulate(engine(), hard, least=0.9)
    assert ended.summary().attainment < 0.9
    assert ended.steps < 0.5 * whole.steps
    assert whole.summary().attainment < 0.9


def test_a_prompt_in_the_prefix_cache_is_not_computed_again(engine: Engines) -> None:
    ids = tuple(range(4))
    first, again, other = (
        Ask(0.0, 2048, 5, ids),
        Ask(5.0, 2048, 5, ids),
        Ask(9.0, 2048, 5, (0, 1, 8, 9)),
    )
    run = simulate(engine(), chat(first, again, other))
    # Of a prompt that is cached as a whole, vLLM computes the last block again.
    assert [o.cached_tokens for o in run.outcomes] == [0, 2048 - 16, 1024]
    ttfts = [o.ttft_ms or 0.0 for o in run.outcomes]
    assert ttfts[1] < ttfts[2] < ttfts[0]


def test_a_conversation_finds_its_own_answers_in_the_cache(engine: Engines) -> None:
    arrivals = Arrivals(0.5)
    talk = conversations(arrivals, Lengths(3), Lengths(320), Lengths(64), 2.0, seconds=10.0, seed=1)
    run = simulate(engine(), Stream("talk", True, SLO, sessions=talk))
    assert len(run.outcomes) == 3 * len(talk)
    turns = [o for o in run.outcomes if o.prompt_tokens == 2 * (320 + 64) + 320]
    assert len(turns) == len(talk)
    # The last generated token has no KV yet when a request ends.
    assert {o.cached_tokens for o in turns} == {(2 * (320 + 64) - 1) // 16 * 16}


def test_a_small_cache_preempts_and_loses_no_token(engine: Engines) -> None:
    small = engine(num_gpu_blocks_override=300, max_model_len=2048)
    asks = [Ask(0.0, 700, 300) for _ in range(8)]
    run = simulate(small, chat(*asks))
    assert [o.tokens for o in run.outcomes] == [300] * 8
    roomy = simulate(engine(), chat(*asks))
    assert run.seconds > roomy.seconds


@pytest.mark.parametrize("scheduler", ["vllm-fcfs", "elastic"])
def test_prefill_and_decode_apart_generate_every_token(engine: Engines, scheduler: str) -> None:
    asks = poisson(4.0)
    apart = [Role.PREFILL, Role.DECODE]
    run = simulate(engine(scheduler), chat(*asks), roles=apart, link="rdma-400g")
    assert [o.tokens for o in run.outcomes] == [a.output_tokens for a in asks]
    assert {(o.prefill, o.decode) for o in run.outcomes} == {("i0", "i1")}
    per_token = engine().kv_token_bytes
    moved = sum(o.prompt_tokens for o in run.outcomes if o.wanted_tokens > 1) * per_token
    # What the receiver's prefix cache has is not sent; these prompts share nothing.
    assert run.moved_bytes == pytest.approx(moved, rel=0.01)


def test_a_slower_link_makes_first_tokens_later(engine: Engines) -> None:
    asks = [Ask(float(i), 4000, 10) for i in range(5)]
    ttfts = []
    for link in ("nvlink", "rdma-400g", "ethernet-25g", "tcp"):
        run = simulate(engine(), chat(*asks), roles=[Role.PREFILL, Role.DECODE], link=link)
        ttfts.append(run.summary().ttft_ms.p50)
    assert ttfts == sorted(ttfts)
    assert ttfts[3] > ttfts[0] + 4000 * engine().kv_token_bytes / LINKS["tcp"].bytes_s * 900


def test_where_the_forward_pass_blocks_a_transfer_begins_after_the_step(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long answer keeps the receiver busy while others' KV comes."""
    made = engine()
    asks = [Ask(0.0, 200, 2000), *(Ask(1.0 + 0.1 * i, 200, 10) for i in range(30))]
    ttfts, steps = [], []
    for blocks in (False, True):
        monkeypatch.setattr(made, "forward_blocks", blocks)
        run = simulate(made, chat(*asks), roles=[Role.PREFILL, Role.DECODE])
        assert all(outcome.finished for outcome in run.outcomes)
        ttfts.append(run.summary().ttft_ms.p50)
        steps.append(run.summary().tpot_ms.p50)
    assert 0.5 * steps[0] < ttfts[1] - ttfts[0] < 2.0 * steps[0]


def test_routing_by_kv_finds_what_turns_miss(engine: Engines) -> None:
    arrivals = Arrivals(2.0)
    talk = conversations(arrivals, Lengths(4), Lengths(600), Lengths(40), 3.0, seconds=15.0, seed=2)
    roles = [Role.MIXED] * 4

    def hits(policy: RoutingPolicy) -> float:
        stream = Stream("talk", True, SLO, sessions=talk)
        run = simulate(engine(kv_events=True), stream, roles=roles, routing=policy)
        assert all(o.finished for o in run.outcomes)
        asked = sum(o.prompt_tokens for o in run.outcomes)
        return sum(o.cached_tokens for o in run.outcomes) / asked

    aware, turns = hits(KvAware()), hits(round_robin())
    possible = (624 + 1264 + 1904) / (600 + 1240 + 1880 + 2520)  # all turns but the first
    assert aware > 0.9 * possible
    assert aware > 2.0 * turns


def test_roles_that_follow_the_load_cut_no_answer(engine: Engines) -> None:
    prompts = [Ask(0.2 * n, 6000, 20) for n in range(60)]
    answers = [Ask(12.0 + 0.1 * n, 100, 300) for n in range(80)]
    section = RouterSection(
        routing="slo_aware", roles="dynamic", tpot_ms=30.0, role_patience=1, role_cool_down_s=1.0
    )
    spec = ClusterSpec([Role.MIXED] * 4, LINKS["nvlink"], drain=False, roles_every_s=0.5)
    cluster = Cluster(spec, engine(), PROFILE, routing_of(section), roles_of(section))
    run = cluster.run([chat(*prompts, *answers)])
    assert [o.tokens for o in run.outcomes] == [20] * 60 + [300] * 80
    changed = [what for _, what in run.events]
    assert any("is prefill" in what for what in changed)
    assert not any("drains" in what for what in changed)
    assert any(o.prefill != o.decode for o in run.outcomes)


def test_offline_work_fills_what_online_work_leaves(engine: Engines) -> None:
    online = chat(*poisson(1.0, seconds=18.0))
    backlog = Stream("batch", False, asks=[Ask(0.0, 800, 100)] * 5000, outstanding=64)
    alone = simulate(engine("elastic"), online).summary()
    found = simulate(engine("elastic"), online, backlog, seconds=20.0).summary()
    assert alone.attainment == found.attainment == 1.0
    assert found.offline_total_tokens_s > 5000.0
    fcfs = simulate(engine(), online, backlog, seconds=20.0).summary()
    assert fcfs.ttft_ms.p90 > found.ttft_ms.p90


def test_a_lost_instance_costs_no_token(engine: Engines) -> None:
    asks = poisson(20.0)
    run = simulate(
        engine(),
        chat(*asks),
        roles=[Role.MIXED, Role.MIXED],
        failures=[Failure("i0", 8.0, 12.0)],
    )
    assert [o.tokens for o in run.outcomes] == [a.output_tokens for a in asks]
    assert {o.attempts for o in run.outcomes} == {1, 2}
    assert [what for _, what in run.events] == ["i0 is lost", "i0 is back"]
    during = [o for o in run.outcomes if 8.0 <= o.arrival_s < 11.9 and o.attempts == 1]
    assert {o.prefill for o in during} == {"i1"}


@pytest.mark.parametrize("lost", ["i0", "i1"])
def test_either_side_of_a_transfer_may_be_lost(engine: Engines, lost: str) -> None:
    asks = poisson(5.0, prompt=4000)
    run = simulate(
        engine(),
        chat(*asks),
        roles=[Role.PREFILL, Role.DECODE],
        link="tcp",
        failures=[Failure(lost, 8.0, 12.0)],
    )
    assert [o.tokens for o in run.outcomes] == [a.output_tokens for a in asks]
    assert max(o.attempts for o in run.outcomes) > 1


def test_with_nobody_there_requests_wait(engine: Engines) -> None:
    run = simulate(engine(), chat(Ask(1.0, 100, 5)), failures=[Failure("i0", 0.5, 3.0)])
    (one,) = run.outcomes
    assert one.first_s is not None
    assert one.first_s > 3.0
    assert one.finished


class _Swap(RolePolicy):
    def roles(self, instances: Sequence[InstanceView], now_s: float) -> Mapping[str, Role]:
        return {"i1": Role.PREFILL, "i0": Role.DECODE}


def test_a_role_changes_when_the_instance_has_drained(engine: Engines) -> None:
    asks = poisson(4.0)
    run = simulate(engine(), chat(*asks), roles=[Role.PREFILL, Role.DECODE], role_policy=_Swap())
    said = [what for _, what in run.events]
    assert "i0 drains, to become decode" in said
    assert said.index("i0 drains, to become decode") < said.index("i0 is decode")
    assert [o.tokens for o in run.outcomes] == [a.output_tokens for a in asks]
    last = run.outcomes[-1]
    assert (last.prefill, last.decode) == ("i1", "i0")


class _Broken(RoutingPolicy):
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        if now_s > 1003.0:
            raise RuntimeError("no idea")
        return round_robin().route(request, instances, now_s)


def test_a_policy_that_raises_is_reported_with_time_and_request(engine: Engines) -> None:
    asks = [Ask(float(i), 100, 5) for i in range(6)]
    with pytest.raises(
        SimulationError, match=r"At 4\.0\d* s \(place chat-4\): RuntimeError: no idea"
    ):
        simulate(engine(), chat(*asks), routing=_Broken())


def test_a_step_policy_that_raises_is_reported(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xllm_scheduler.engine.elastic import ElasticPolicy

    def broken(*_: Any) -> None:
        raise ValueError("upside down")

    monkeypatch.setattr(ElasticPolicy, "plan", broken)
    with pytest.raises(SimulationError, match=r"At 1\.0.*i0 raised ValueError: upside down"):
        simulate(engine("elastic"), chat(Ask(1.0, 100, 5)))


def test_the_same_seed_is_the_same_run(engine: Engines) -> None:
    backlog = Stream("batch", False, asks=[Ask(0.0, 800, 100)] * 500, outstanding=16)
    roles = [Role.PREFILL, Role.DECODE, Role.MIXED]
    first, again = (
        dataclasses.asdict(
            simulate(engine("elastic"), chat(*poisson(3.0)), backlog, roles=roles, seconds=15.0)
        )
        for _ in range(2)
    )
    assert repr(first) == repr(again)


def test_requests_that_no_instance_can_hold_are_left_out(engine: Engines) -> None:
    run = simulate(engine(), chat(Ask(0.0, 50_000, 5), Ask(0.0, 50, 5)))
    assert (run.dropped, len(run.outcomes)) == (1, 1)
    assert math.isfinite(run.seconds)
