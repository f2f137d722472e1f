"""What few requests do: bad bodies, several prompts, refusals on the way, kills at the very end."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from typing import Any

import pytest

from benchmarks.lab.stub_engine import tokens_of
from tests.service.conftest import MODEL, WAIT_S, Stub
from tests.service.test_gateway import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    begun,
    chat,
    chunks,
    complete,
    expected,
    text,
    until,
)
from xllm_plugins.errors import ConfigError
from xllm_scheduler.service.command import add_command, run


def name_of(one: Stub) -> str:
    return one.url.removeprefix("http://")


async def divided(stub: Any, router: Any, **settings: Any) -> tuple[Any, Stub, Stub]:
    """A router over an instance for prompts and one for answers."""
    prefill, decode = await stub(), await stub()
    url = await router(prefill, decode, **settings)
    for one, role in ((prefill, "prefill"), (decode, "decode")):
        await url.admin("PUT", f"/instances/{name_of(one)}/role", params={"role": role})
    for one in (prefill, decode):
        one.engine.asked.clear()
    return url, prefill, decode


async def test_every_path_of_the_api_wants_a_key(stub: Any, router: Any, tmp_path: Any) -> None:
    url = await router(await stub(), api_keys="k1", data=str(tmp_path))
    for path in ("/v1/models", "/v1/files", "/v1/batches", "/v1/files/x/content"):
        async with url.session.get(url.url + path) as answer:
            assert answer.status == 401, path
    async with url.session.get(
        url.url + "/v1/models", headers={"authorization": "Bearer k1"}
    ) as answer:
        assert answer.status == 200


async def test_a_key_in_either_header_stays_here(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, api_keys="k1", instance_key="inner")
    await url.ask(CHAT, chat(), headers={"x-api-key": "k1"})
    headers = one.engine.asked[-1][1]
    assert headers["authorization"] == "Bearer inner"
    assert "x-api-key" not in headers


async def test_instances_with_a_key_join_and_are_asked_with_it(stub: Any, router: Any) -> None:
    one = await stub(key="inner")
    url = await router(one, instance_key="inner", routing="kv_aware", tokenizers="instances")
    await url.ask(CHAT, chat(), headers={"x-request-id": "mine"})
    await url.ask(CHAT, chat(), headers={"x-request-id": "again"})
    found = await url.admin("GET", "/requests/again")
    assert found["cached_tokens"] != {}


@pytest.mark.parametrize("messages", [1, "x", [1], {"a": 1}])
async def test_messages_of_another_type_are_the_instances_to_refuse(
    stub: Any, router: Any, messages: Any
) -> None:
    url = await router(await stub(), routing="kv_aware", tokenizers="instances")
    async with url.session.post(
        url.url + CHAT, json={"model": MODEL, "messages": messages}
    ) as answer:
        assert answer.status < 500, await answer.text()


async def test_a_trial_whose_client_goes_lets_another_one_try(stub: Any, router: Any) -> None:
    """The circuit of an instance must not stay half-open for a request that nobody waits for."""
    one = await stub(token_ms=50.0)
    url = await router(one, queue_s=WAIT_S)
    service = url.service
    breaker = service.fleet._breakers[name_of(one)]
    for _ in range(breaker.failures):
        breaker.failed(-1000.0)
    asking = asyncio.create_task(url.ask(COMPLETIONS, complete(max_tokens=100_000)))
    await until(lambda: one.engine.under_way)
    asking.cancel()
    await until(lambda: not one.engine.under_way)
    assert (await url.ask(COMPLETIONS, complete(max_tokens=2)))["choices"]


async def test_several_prompts_stay_together(stub: Any, router: Any) -> None:
    url, prefill, decode = await divided(stub, router)
    await url.ask(COMPLETIONS, complete(prompt=["a", "b"]))
    await url.ask(COMPLETIONS, complete(use_beam_search=True))
    await url.ask(COMPLETIONS, complete(n=2))
    asked = [*prefill.engine.asked, *decode.engine.asked]
    assert len(asked) == 3
    assert not any("kv_transfer_params" in body for body, _ in asked)
    await url.ask(COMPLETIONS, complete(prompt=[5, 6, 7]))
    assert decode.engine.asked[-1][0]["kv_transfer_params"]["do_remote_prefill"]


@pytest.mark.parametrize("more", [{"prompt": ["a", "b"]}, {"n": 2}])
async def test_several_answers_are_not_taken_for_one(
    stub: Any, router: Any, more: dict[str, Any]
) -> None:
    stubs = [await stub(token_ms=10.0) for _ in range(2)]
    url = await router(*stubs)
    data, answer = await begun(url, COMPLETIONS, complete(max_tokens=40, **more))
    await next(s for s in stubs if s.engine.under_way).dies()
    last = chunks(data + await answer.read())[-1]
    assert "the answer cannot go on" in last["error"]["message"]


async def test_an_answer_lost_behind_its_last_token_still_tells_its_usage(
    stub: Any, router: Any
) -> None:
    one = await stub()
    url = await router(one, await stub())
    one.engine.stops_before_usage = True
    for _ in range(2):  # one of them goes there
        data = await url.stream(CHAT, chat(stream_options={"include_usage": True}))
        assert text(data) == expected(MESSAGES)
        assert data.endswith(b"data: [DONE]\n\n")
        usage = chunks(data)[-1]["usage"]
        assert usage["prompt_tokens"] == len(tokens_of(MESSAGES))
        assert usage["completion_tokens"] == 12


async def test_a_refusal_at_the_prefill_instance_is_the_answer_and_no_fault(
    stub: Any, router: Any
) -> None:
    url, prefill, decode = await divided(stub, router)
    prefill.engine.refuses = True
    for _ in range(6):  # more than open a circuit
        found = await url.ask(CHAT, chat(), status=400)
        assert "too long" in found["error"]["message"]
    prefill.engine.refuses = False
    prefill.engine.asked.clear()
    assert text(await url.stream(CHAT, chat())) == expected(MESSAGES)
    assert len(prefill.engine.asked) == 1
    assert decode.engine.asked[-1][0]["kv_transfer_params"]["do_remote_prefill"]


async def test_a_prompt_whose_answer_ends_at_once_is_no_fault_either(
    stub: Any, router: Any
) -> None:
    url, prefill, decode = await divided(stub, router)
    prefill.engine.ends_at_once = True
    await url.ask(CHAT, chat())
    prefill.engine.ends_at_once = False
    await url.ask(CHAT, chat())
    assert decode.engine.asked[-1][0]["kv_transfer_params"]["do_remote_prefill"]


async def test_a_prefill_that_takes_too_long_is_done_elsewhere(stub: Any, router: Any) -> None:
    url, prefill, decode = await divided(stub, router, prefill_timeout_s=0.2, retries=1)
    prefill.engine.stuck = True
    assert text(await url.stream(CHAT, chat())) == expected(MESSAGES)
    assert "kv_transfer_params" not in decode.engine.asked[-1][0]


async def test_an_image_is_not_taken_for_a_long_prompt(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, routing="least_loaded", probe_s=60.0)
    one.engine.hang()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    content = [{"type": "text", "text": "What is this?"}, image]
    asking = asyncio.create_task(
        url.ask(CHAT, {"model": MODEL, "messages": [{"role": "user", "content": content}]})
    )
    await until(lambda: one.engine.under_way)
    (there,) = (await url.status())["instances"]
    assert 1000 < there["waiting_tokens"] < 1200
    one.engine.go_on()
    await asking


async def test_without_events_prompts_are_known_by_what_was_sent(stub: Any, router: Any) -> None:
    stubs = [await stub() for _ in range(3)]
    url = await router(*stubs, routing="kv_aware", tokenizers="instances")
    prompt = "the same long prompt " * 20
    for _ in range(6):
        await url.ask(COMPLETIONS, complete(prompt=prompt, max_tokens=2))
    assert sorted(len(s.engine.asked) for s in stubs) == [0, 0, 6]


async def test_offline_requests_leave_an_instance_that_drains_and_online_ones_end_there(
    stub: Any, router: Any
) -> None:
    one, other = await stub(token_ms=50.0), await stub(token_ms=50.0)
    url = await router(one, other, retries=0)

    async def drain(which: Stub, drains: bool) -> None:
        path = f"/instances/{name_of(which)}/drain"
        await url.admin("POST", path, params={"drains": str(drains).lower()})

    await drain(other, drains=True)
    offline = complete(max_tokens=60, vllm_xargs={"xllm_class": "offline"})
    asked = [
        asyncio.create_task(url.stream(COMPLETIONS, complete(max_tokens=60))),
        asyncio.create_task(url.stream(COMPLETIONS, offline)),
        asyncio.create_task(url.ask(COMPLETIONS, offline)),
    ]
    await until(lambda: one.engine.under_way == 3)
    await drain(other, drains=False)
    await drain(one, drains=True)
    await until(lambda: (one.engine.under_way, other.engine.under_way) == (1, 2))
    await drain(other, drains=True)  # there is nowhere else to go
    streams = [await asked[0], await asked[1]]
    assert [text(stream) for stream in streams] == [expected("hello", 60)] * 2
    assert (await asked[2])["choices"][0]["text"] == expected("hello", 60)
    assert [len(s.engine.asked) for s in (one, other)] == [3, 2]


async def test_what_an_instance_held_is_compared_with_what_was_expected(
    stub: Any, router: Any
) -> None:
    one = await stub()
    url = await router(one, routing="kv_aware", tokenizers="instances")
    prompt = "the same long prompt " * 20

    async def told() -> dict[str, int]:
        async with url.session.get(url.url + "/metrics") as answer:
            found = re.findall(r'router_hit_tokens{what="(\w+)"} (\S+)', await answer.text())
        return {what: round(float(count)) for what, count in found}

    one.engine.cached = 0
    await url.ask(COMPLETIONS, complete(prompt=prompt))
    one.engine.cached = 32
    usage = {"stream_options": {"include_usage": True}}
    await url.stream(COMPLETIONS, complete(prompt=prompt, **usage))
    expects = (len(tokens_of(prompt)) - 1) // 16 * 16
    assert await told() == {"expected": expects, "stale": expects - 32, "missed": 0}
    one.engine.cached = 48
    await url.ask(COMPLETIONS, complete(prompt="another prompt " * 20))
    assert await told() == {"expected": expects, "stale": expects - 32, "missed": 48}


async def test_a_removed_instance_stays_away_until_it_is_added_again(
    stub: Any, router: Any
) -> None:
    one = await stub()
    url = await router()
    record = {"name": "a", "url": one.url, "models": [MODEL], "incarnation": "1"}
    await url.admin("POST", "/instances", json=record)
    await url.admin("DELETE", "/instances/a")
    found = await url.admin("POST", "/instances", json=record, status=409)
    assert "was removed" in found["error"]["message"]
    await url.admin("POST", "/instances", json={**record, "incarnation": "2"})
    await url.admin("DELETE", "/instances/a")
    await url.admin("POST", "/instances", json={"url": one.url, "name": "a"})
    await url.admin("POST", "/instances", json={**record, "incarnation": "2"})
    assert len((await url.status())["instances"]) == 1


async def test_an_error_of_the_routers_own_is_said_in_openais_form(stub: Any, router: Any) -> None:
    url = await router(await stub())

    def fails(*args: Any, **more: Any) -> None:
        raise RuntimeError("a fault")

    url.service.fleet.place = fails
    found = await url.ask(CHAT, chat(), status=500)
    assert found["error"]["message"] == "The router failed; its log says why."


async def test_what_is_refused_by_all_tells_when_to_come_again(stub: Any, router: Any) -> None:
    one = await stub()
    url = await router(one, retries=0)
    one.engine.busy = True
    async with url.session.post(url.url + CHAT, data=json.dumps(chat())) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (503, "7")
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("moved", "status"), [(0, 409), (4096, 200)])
async def test_a_role_wants_bytes_to_have_moved_where_they_are_counted(
    stub: Any, router: Any, monkeypatch: pytest.MonkeyPatch, moved: int, status: int
) -> None:
    """Where KV did not come vLLM computes the prompt, and the answer looks the same."""
    monkeypatch.setattr("xllm_scheduler.service.turning._COUNTED_S", 0.3)
    prefill, decode = await stub(), await stub()
    for one in (prefill, decode):
        one.engine.moves_bytes = moved
    url = await router(prefill, decode)
    found = await url.admin(
        "PUT", f"/instances/{name_of(decode)}/role", status=status, params={"role": "decode"}
    )
    if status == 409:
        assert "did not get the KV" in found["error"]["message"]
    roles = {i["name"]: i["role"] for i in (await url.status())["instances"]}
    assert roles[name_of(decode)] == ("decode" if status == 200 else "mixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x", "--instances", "http://a:1"], "with router.data allowed is 1"),
        ([], "allowed is 1 without router.etcd and router.instances"),
    ],
)
def test_several_processes_need_to_know_the_same(arguments: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    args = parser.parse_args(["router", "--workers", "2", *arguments])
    with pytest.raises(ConfigError, match=message):
        run(args)
