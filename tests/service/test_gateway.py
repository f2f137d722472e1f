"""A request's way through the router: passed on whole, sent again, gone on elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import aiohttp
import pytest

from benchmarks.lab.server import free_port
from benchmarks.lab.stub_engine import generated, text_of, tokens_of
from tests.service.conftest import MODEL, WAIT_S

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, **more}


def complete(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 12, **more}


def expected(prompt: Any, count: int = 12) -> str:
    return "".join(text_of(t) for t in itertools.islice(generated(tokens_of(prompt)), count))


def chunks(data: bytes) -> list[dict[str, Any]]:
    events = [e.removeprefix(b"data: ") for e in data.split(b"\n\n") if e]
    return [json.loads(e) for e in events if e != b"[DONE]"]


def text(data: bytes) -> str:
    choices = [choice for chunk in chunks(data) for choice in chunk.get("choices", ())]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


async def until(condition: Any) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), WAIT_S)


async def begun(url: Any, path: str, body: dict[str, Any]) -> tuple[bytes, aiohttp.ClientResponse]:
    """The first tokens of a stream, and its answer, from which the rest is still to be read."""
    answer = await url.session.post(url.url + path, json={**body, "stream": True})
    assert answer.status == 200
    data = b""
    while data.count(b"\n\n") < 4:
        data += await answer.content.readany()
    return data, answer


async def test_an_answer_comes_as_the_instance_gave_it(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one)
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    sent = {"x-own": "1", "traceparent": trace, "tracestate": "a=1"}
    answer = await url.ask(CHAT, chat(own_field={"a": [1]}), headers=sent)
    assert answer["choices"][0]["message"]["content"] == expected(MESSAGES)
    assert answer["usage"]["completion_tokens"] == 12
    (body, headers) = one.engine.asked[-1]
    assert body == chat(own_field={"a": [1]})
    assert headers["x-own"] == "1"
    assert (headers["traceparent"], headers["tracestate"]) == (trace, "a=1")
    assert len(headers["x-request-id"]) == 32


@pytest.mark.parametrize(("path", "body", "prompt"), [
    (CHAT, chat(), MESSAGES), (COMPLETIONS, complete(), "hello")])  # fmt: skip
async def test_a_stream_comes_whole_and_without_what_was_added(
    stub: Any, router: Any, path: str, body: dict[str, Any], prompt: Any
) -> None:
    url = await router(await stub())
    data = await url.stream(path, body)
    assert text(data) == expected(prompt)
    assert data.endswith(b"data: [DONE]\n\n")
    assert b"token_ids" not in data
    own = await url.stream(path, {**body, "return_token_ids": True})
    assert b'"token_ids":[' in own


async def test_requests_of_one_name_do_not_get_mixed_up(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, probe_s=60.0)
    one.engine.hang()
    headers = {"x-request-id": "same"}
    asked = [url.ask(COMPLETIONS, complete(prompt=f"p{n}"), headers=headers) for n in range(5)]
    asking = asyncio.gather(*asked)
    await until(lambda: one.engine.under_way == 5)
    one.engine.go_on()
    found = [answer["choices"][0]["text"] for answer in await asking]
    assert found == [expected(f"p{n}") for n in range(5)]
    assert len({sent["x-request-id"] for _, sent in one.engine.asked}) == 5
    assert (await url.status())["instances"][0]["running"] == 0


async def test_instances_take_turns(stub: Any, router: Any) -> None:
    stubs = [await stub() for _ in range(3)]
    url = await router(*stubs)
    for _ in range(6):
        await url.ask(COMPLETIONS, complete())
    assert [len(s.engine.asked) for s in stubs] == [2, 2, 2]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "Expected `object`, got `array`"),
        (b'{"model": 3}', 400, "model: Expected `str`"),
        (b'{"model": "stub", "stream": "yes"}', 400, "stream: Expected `bool"),
        (b'{"model": "unknown"}', 404, "'unknown' is not served here; allowed are stub"),
        (b'{"model": "stub", "service_tier": "gold"}', 400, "service_tier is 'gold'"),
        (b'{"model": "stub", "vllm_xargs": {"xllm_ttft_ms": -1}}', 400, "xllm_ttft_ms is -1"),
        (b'{"model": "stub", "messages": "' + b"x" * 2000 + b'"}', 413, "longer than 1000 bytes"),
    ],
)
async def test_a_bad_request_gets_a_sentence(
    stub: Any, router: Any, body: bytes, status: int, message: str
) -> None:
    url = await router(await stub(), most_body_bytes=1000)
    found = await url.ask(CHAT, body, status=status)
    assert message in found["error"]["message"]
    assert set(found["error"]) == {"message", "type", "param", "code"}


async def test_keys_are_checked_and_instances_get_their_own(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, api_keys="k1,k2", instance_key="inner")
    for headers in ({}, {"authorization": "Bearer k3"}):
        found = await url.ask(CHAT, chat(), status=401, headers=headers)
        assert found["error"]["code"] == "invalid_api_key"
    await url.ask(CHAT, chat(), headers={"authorization": "Bearer k2"})
    assert one.engine.asked[-1][1]["authorization"] == "Bearer inner"


async def test_without_an_instance_it_says_so_and_when_to_come_again(router: Any) -> None:
    url = await router(queue_s=0.0)
    async with url.session.post(url.url + CHAT, json=chat()) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert (await answer.json())["error"]["code"] == "no_instance"


async def test_a_request_waits_for_an_instance_that_joins(stub: Any, router: Any) -> None:
    url = await router(queue_s=WAIT_S)
    asking = asyncio.create_task(url.ask(CHAT, chat()))
    await asyncio.sleep(0.1)
    await url.admin("POST", "/instances", json={"url": (await stub()).url})
    assert (await asking)["choices"]


async def test_more_requests_than_are_allowed_are_refused(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, most_requests=1, probe_s=60.0)
    one.engine.hang()
    first = asyncio.create_task(url.stream(COMPLETIONS, complete()))
    await until(lambda: one.engine.under_way)
    found = await url.ask(COMPLETIONS, complete(), status=429)
    assert found["error"]["type"] == "rate_limit_error"
    one.engine.go_on()
    assert text(await first) == expected("hello")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_goes_frees_the_instance(
    stub: Any, router: Any, streamed: bool
) -> None:
    one = await stub(token_ms=50.0)
    url = await router(one)
    body = complete(stream=streamed, max_tokens=100_000)
    asking = asyncio.create_task(url.ask(COMPLETIONS, body))
    await until(lambda: one.engine.under_way)
    asking.cancel()
    await until(lambda: not one.engine.under_way)


async def test_an_instance_that_does_not_answer_costs_no_request(stub: Any, router: Any) -> None:
    one, other = await stub(), await stub()
    url = await router(one, other, probe_s=60.0)
    await one.dies()
    for _ in range(4):
        assert text(await url.stream(CHAT, chat())) == expected(MESSAGES)


@pytest.mark.parametrize(("path", "body", "prompt"), [
    (CHAT, chat(max_tokens=40), MESSAGES),
    (COMPLETIONS, complete(max_tokens=40), "hello"),
])  # fmt: skip
async def test_an_answer_goes_on_elsewhere_without_a_token_lost_or_doubled(
    stub: Any, router: Any, path: str, body: dict[str, Any], prompt: Any
) -> None:
    stubs = [await stub(token_ms=10.0) for _ in range(2)]
    url = await router(*stubs)
    data, answer = await begun(url, path, {**body, "stream_options": {"include_usage": True}})
    serving = next(s for s in stubs if s.engine.under_way)
    await serving.dies()
    data += await answer.read()
    assert text(data) == expected(prompt, 40)
    assert len({chunk["id"] for chunk in chunks(data)}) == 1
    usage = chunks(data)[-1]["usage"]
    assert usage["completion_tokens"] == 40
    assert usage["prompt_tokens"] == len(tokens_of(prompt))
    other = next(s for s in stubs if s is not serving)
    assert 0 < other.engine.asked[-1][0]["max_tokens"] < 40


async def test_an_instance_that_hangs_in_its_answer_is_given_up(stub: Any, router: Any) -> None:
    """As a stopped process: its connections stay, and nothing comes any more."""
    stubs = [await stub(token_ms=20.0) for _ in range(2)]
    url = await router(*stubs)
    data, answer = await begun(url, COMPLETIONS, complete(max_tokens=30))
    next(s for s in stubs if s.engine.under_way).engine.hang()
    data += await asyncio.wait_for(answer.read(), WAIT_S)
    assert text(data) == expected("hello", 30)


async def test_an_instance_that_hangs_before_its_answer_is_given_up(stub: Any, router: Any) -> None:
    stubs = [await stub() for _ in range(2)]
    url = await router(*stubs)
    for one in stubs:
        one.engine.hang()
    asking = asyncio.create_task(url.ask(COMPLETIONS, complete(max_tokens=30)))
    await until(lambda: any(s.engine.under_way for s in stubs))
    next(s for s in stubs if not s.engine.under_way).engine.go_on()
    answer = await asyncio.wait_for(asking, WAIT_S)
    assert answer["choices"][0]["text"] == expected("hello", 30)


async def test_an_answer_that_may_not_go_on_ends_with_the_reason(stub: Any, router: Any) -> None:
    stubs = [await stub(token_ms=10.0) for _ in range(2)]
    url = await router(*stubs)
    data, answer = await begun(url, CHAT, chat(max_tokens=40, seed=1))
    await next(s for s in stubs if s.engine.under_way).dies()
    last = chunks(data + await answer.read())[-1]
    assert "the answer cannot go on: seed is set" in last["error"]["message"]


async def test_prompt_and_answer_at_different_instances(stub: Any, router: Any) -> None:
    prefill, decode = await stub(), await stub()
    url = await router(prefill, decode)
    for one, role in ((prefill, "prefill"), (decode, "decode")):
        name = one.url.removeprefix("http://")
        await url.admin("PUT", f"/instances/{name}/role", params={"role": role})
    assert text(await url.stream(CHAT, chat())) == expected(MESSAGES)
    first, _ = prefill.engine.asked[-1]
    assert (first["max_tokens"], first["stream"]) == (1, False)
    assert first["kv_transfer_params"]["do_remote_decode"]
    second, _ = decode.engine.asked[-1]
    assert second["kv_transfer_params"]["do_remote_prefill"]
    assert second["kv_transfer_params"]["prompt_token_ids"] == tokens_of(MESSAGES)
    assert second["max_tokens"] == 12
    answer = await url.ask(COMPLETIONS, complete())
    assert answer["choices"][0]["text"] == expected("hello")


async def test_an_instance_that_offers_no_kv_is_not_asked_again(stub: Any, router: Any) -> None:
    prefill, decode = await stub(), await stub()
    url = await router(prefill, decode)
    for one, role in ((prefill, "prefill"), (decode, "decode")):
        name = one.url.removeprefix("http://")
        await url.admin("PUT", f"/instances/{name}/role", params={"role": role})
    prefill.engine.transfers = False
    for one in (prefill, decode):
        one.engine.asked.clear()
    for _ in range(2):
        assert text(await url.stream(CHAT, chat())) == expected(MESSAGES)
    assert len(decode.engine.asked) == 1
    assert [body["max_tokens"] for body, _ in prefill.engine.asked] == [1, 12]


async def test_a_role_is_changed_only_if_kv_really_moves(stub: Any, router: Any) -> None:
    prefill, decode = await stub(), await stub()
    url = await router(prefill, decode)
    name = prefill.url.removeprefix("http://")
    prefill.engine.transfers = False
    found = await url.admin(
        "PUT", f"/instances/{name}/role", status=409, params={"role": "prefill"}
    )
    assert f"The role stays: {name} offers no KV to others." in found["error"]["message"]
    assert {one["role"] for one in (await url.status())["instances"]} == {"mixed"}
    prefill.engine.transfers = True
    await url.admin("PUT", f"/instances/{name}/role", params={"role": "prefill"})
    checked, _ = decode.engine.asked[-1]
    assert checked["kv_transfer_params"]["do_remote_prefill"]
    await decode.dies()
    found = await url.admin("PUT", f"/instances/{name}/role", params={"role": "mixed"})
    assert found["role"] == "mixed"


async def test_a_lost_prefill_instance_costs_no_request(stub: Any, router: Any) -> None:
    prefill, decode = await stub(), await stub()
    url = await router(prefill, decode, probe_s=60.0)
    for one, role in ((prefill, "prefill"), (decode, "decode")):
        name = one.url.removeprefix("http://")
        await url.admin("PUT", f"/instances/{name}/role", params={"role": role})
    await prefill.dies()
    assert text(await url.stream(CHAT, chat())) == expected(MESSAGES)


async def test_admin_paths_want_the_token(stub: Any, router: Any) -> None:
    url = await router(await stub())
    calls = [
        ("POST", "/instances"), ("DELETE", "/instances/x"), ("POST", "/instances/x/drain"),
        ("PUT", "/instances/x/role?role=prefill"), ("POST", "/instances/x/beat"),
        ("GET", "/requests/x"), ("PUT", "/settings"),
    ]  # fmt: skip
    for method, path in calls:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            call = url.session.request(
                method, url.url + "/xllm/v1" + path, headers=headers, json={}
            )
            async with call as answer:
                assert answer.status == 401, path
    assert (await url.status())["instances"][0]["health"] == "ready"


async def test_without_a_token_set_admin_paths_are_closed(stub: Any, router: Any) -> None:
    url = await router(await stub(), admin_token="")
    async with url.session.post(
        url.url + "/xllm/v1/instances", json={}, headers={"authorization": "Bearer "}
    ) as answer:
        assert answer.status == 401


async def test_a_draining_instance_gets_nothing_new(stub: Any, router: Any) -> None:
    stubs = [await stub(), await stub()]
    url = await router(*stubs)
    name = stubs[0].url.removeprefix("http://")
    await url.admin("POST", f"/instances/{name}/drain")
    for _ in range(4):
        await url.ask(CHAT, chat())
    assert [len(s.engine.asked) for s in stubs] == [0, 4]
    await url.admin("DELETE", f"/instances/{name}")
    assert len((await url.status())["instances"]) == 1
    found = await url.admin("DELETE", f"/instances/{name}", status=404)
    assert "There is no instance" in found["error"]["message"]


async def test_a_decision_is_explained(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, routing="slo_aware", tokenizers="instances")
    await url.ask(CHAT, chat(), headers={"x-request-id": "mine"})
    found = await url.admin("GET", "/requests/mine")
    name = one.url.removeprefix("http://")
    assert found["route"]["prefill"] == name
    assert [cost[0] for cost in found["route"]["costs"]] == [name]
    await url.admin("GET", "/requests/other", status=404)


async def test_policies_change_while_it_serves(stub: Any, router: Any) -> None:
    url = await router(await stub(), await stub())
    await url.ask(CHAT, chat(), headers={"x-request-id": "before"})
    changed = await url.admin("PUT", "/settings", json={"routing": "kv_aware"})
    assert changed["routing"] == "kv_aware"
    await url.ask(CHAT, chat(), headers={"x-request-id": "after"})
    found = [await url.admin("GET", f"/requests/{name}") for name in ("before", "after")]
    assert [bool(one["route"]["costs"]) for one in found] == [False, True]
    for values, message in (
        ({"routing": "none"}, "no service.routing policy named 'none'"),
        ({"ttft_ms": -1}, "router.ttft_ms"),
        ({"api_keys": "x"}, "router.api_keys does not change at run time"),
    ):
        answer = await url.admin("PUT", "/settings", status=400, json=values)
        assert message in answer["error"]["message"]


async def test_what_the_router_tells_of_itself(stub: Any, router: Any) -> None:
    url = await router(await stub(), await stub())
    await url.stream(CHAT, chat(vllm_xargs={"xllm_ttft_ms": 6e4, "xllm_tpot_ms": 6e4}))
    async with url.session.get(url.url + "/v1/models") as answer:
        models = await answer.json()
    assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [(MODEL, 100_000)]
    async with url.session.get(url.url + "/metrics") as answer:
        metrics = await answer.text()
    assert 'xllm:router_finished_total{class="online"} 1.0' in metrics
    assert 'xllm:router_instances{health="ready",role="mixed"} 2.0' in metrics
    assert 'xllm:router_index_changes{what="unknown_parents"} 0.0' in metrics
    for path, status in (("/health", 200), ("/ready", 200), ("/nothing", 404)):
        async with url.session.get(url.url + path) as answer:
            assert answer.status == status
    (recent,) = (await url.status())["recent"]
    assert recent["met"]


async def test_it_is_alive_but_not_ready_without_instances(router: Any) -> None:
    url = await router()
    for path, status in (("/health", 200), ("/ready", 503)):
        async with url.session.get(url.url + path) as answer:
            assert answer.status == status


async def test_a_listed_instance_that_was_gone_for_long_comes_back(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, suspect_s=0.3)
    await one.dies()

    async def known() -> int:
        return len((await url.status())["instances"])

    async def wait(count: int) -> None:
        while await known() != count:
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(0), WAIT_S)
    await stub(port=int(one.url.rpartition(":")[2]))
    await asyncio.wait_for(wait(1), WAIT_S)
    assert (await url.ask(CHAT, chat()))["choices"]


async def test_an_instance_that_is_listed_joins_when_it_is_there(stub: Any, router: Any) -> None:
    port = free_port()
    url = await router(instances=f"http://127.0.0.1:{port}", wait=False)
    assert (await url.status())["instances"] == []
    await stub(port=port)
    await asyncio.wait_for(url.joined(1), WAIT_S)
    assert (await url.ask(CHAT, chat()))["choices"]


async def test_an_answer_that_is_no_stream_is_passed_on_all_the_same(
    stub: Any, router: Any
) -> None:
    url = await router(await stub())
    answer = await url.ask("/v1/embeddings", {"model": MODEL, "input": "x", "stream": True})
    assert answer == {"object": "/v1/embeddings"}


async def test_another_method_is_refused_with_the_one_that_is_allowed(
    stub: Any, router: Any
) -> None:
    url = await router(await stub())
    async with url.session.get(url.url + CHAT) as answer:
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert "allowed is POST" in (await answer.json())["error"]["message"]
