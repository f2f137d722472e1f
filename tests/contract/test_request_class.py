"""A request's class and tier pass through vLLM's own serving methods and protocol classes."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import Request
from vllm.entrypoints.openai.chat_completion import protocol as chat
from vllm.entrypoints.openai.completion import protocol as completion
from vllm.entrypoints.openai.responses import protocol as responses

from xllm_plugins.compat import is_patched, request_class, resolve_target
from xllm_scheduler.classes import complete_xargs
from xllm_scheduler.config import SchedulerSection

pytestmark = pytest.mark.vllm

OFFLINE = {"xllm_class": "offline"}


def chat_request(**fields: Any) -> Any:
    messages = [{"role": "user", "content": "Hello"}]
    return chat.ChatCompletionRequest(model="m", messages=messages, **fields)


def completion_request(**fields: Any) -> Any:
    return completion.CompletionRequest(model="m", prompt="Hello", **fields)


def responses_request(**fields: Any) -> Any:
    return responses.ResponsesRequest(model="m", input="Hello", **fields)


REQUESTS = pytest.mark.parametrize("new", [chat_request, completion_request, responses_request])
PATHS = dict(
    zip(
        (chat_request, completion_request, responses_request),
        (target.path for target in request_class.SEAM),
        strict=True,
    )
)
ANSWERS: dict[Callable[..., Any], Any] = {
    chat_request: chat.ChatCompletionResponse,
    completion_request: completion.CompletionResponse,
    responses_request: responses.ResponsesResponse,
}


class Served:
    """A serving object of vLLM whose method records its request in place of generating."""

    def __init__(self, new: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Any] = []
        self.answer = ANSWERS[new].model_construct(service_tier=None)
        owner_path, self._method = PATHS[new].rsplit(".", 1)
        self._owner = resolve_target(owner_path)

        async def original(serving: Any, request: Any, raw_request: Any = None) -> Any:
            self.seen.append(request)
            return self.answer

        monkeypatch.setattr(self._owner, self._method, original)
        section = SchedulerSection(ttft_ms=800.0, tpot_ms=80.0, priority_tier_factor=0.5)
        request_class.install(lambda xargs, tier: complete_xargs(xargs, tier, section))
        assert is_patched(self._owner, self._method)

    async def __call__(self, request: Any, body: dict[str, Any] | None = None) -> Any:
        serving = self._owner.__new__(self._owner)
        serving.has_kv_connector = False
        call = getattr(serving, self._method)
        if body is None:
            return await call(request)
        return await call(request, _raw(body))


def _raw(body: dict[str, Any]) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@pytest.mark.parametrize("target", request_class.SEAM, ids=lambda target: target.path)
def test_vllm_serves_with_a_coroutine_of_request_and_raw_request(target: Any) -> None:
    importlib.import_module(target.path.partition(":")[0])
    method = inspect.unwrap(resolve_target(target.path))
    assert inspect.iscoroutinefunction(method)
    parameters = inspect.signature(method).parameters
    assert tuple(parameters) == ("self", "request", "raw_request")
    assert parameters["raw_request"].default is None


@REQUESTS
def test_xargs_reach_the_engine(new: Callable[..., Any]) -> None:
    request = new()
    request.vllm_xargs = {"xllm_class": "offline", "xllm_ttft_ms": 400.0}
    params = request.to_sampling_params(16, {})
    assert params.extra_args == {"xllm_class": "offline", "xllm_ttft_ms": 400.0}


@REQUESTS
@pytest.mark.parametrize("over_http", [True, False])
async def test_the_flex_tier_is_offline_and_is_named_in_the_answer(
    new: Callable[..., Any], over_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(new, monkeypatch)
    answer = await serve(new(service_tier="flex"), {"service_tier": "flex"} if over_http else None)
    (seen,) = serve.seen
    assert seen.to_sampling_params(16, {}).extra_args == OFFLINE
    assert answer.service_tier == "flex"


@REQUESTS
async def test_the_priority_tier_tightens_the_slos(
    new: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(new, monkeypatch)
    await serve(new(vllm_xargs={"mine": 1}), {"service_tier": "priority"})
    assert serve.seen[0].vllm_xargs == {
        "mine": 1,
        "xllm_class": "online",
        "xllm_ttft_ms": 400.0,
        "xllm_tpot_ms": 40.0,
    }


@REQUESTS
@pytest.mark.parametrize(("tier", "named"), [("auto", "default"), ("default", "default")])
async def test_other_tiers_change_nothing_but_the_answer(
    new: Callable[..., Any], tier: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(new, monkeypatch)
    answer = await serve(new(), {"service_tier": tier})
    assert serve.seen[0].vllm_xargs is None
    assert answer.service_tier == named


@REQUESTS
@pytest.mark.parametrize("over_http", [True, False])
async def test_a_request_that_names_no_tier_passes_as_it_is(
    new: Callable[..., Any], over_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(new, monkeypatch)
    answer = await serve(new(), {} if over_http else None)
    assert serve.seen[0].vllm_xargs is None
    assert answer.service_tier is None


@REQUESTS
@pytest.mark.parametrize(
    ("fields", "body", "sentence"),
    [
        ({}, {"service_tier": "fast"}, "service_tier is 'fast'; allowed is auto, default, flex"),
        ({"vllm_xargs": {"xllm_class": "batch"}}, {}, "xllm_class is 'batch'; allowed is online"),
        ({"vllm_xargs": {"xllm_tpot_ms": 0}}, {}, "xllm_tpot_ms is 0; allowed is a number of"),
    ],
)
async def test_what_cannot_be_served_is_a_400_and_reaches_nothing(
    new: Callable[..., Any],
    fields: dict[str, Any],
    body: dict[str, Any],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = Served(new, monkeypatch)
    refusal = await serve(new(**fields), body)
    assert type(refusal).__name__ == "ErrorResponse"
    assert (refusal.error.code, refusal.error.type) == (400, "BadRequestError")
    assert refusal.error.message.startswith(sentence)
    assert serve.seen == []


@REQUESTS
async def test_a_stream_is_handed_through(
    new: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "data: {}"

    serve = Served(new, monkeypatch)
    serve.answer = chunks()
    answer = await serve(new(), {"service_tier": "flex"})
    assert answer is serve.answer
    assert [chunk async for chunk in answer] == ["data: {}"]


@pytest.mark.parametrize("tier", ["standard_only"])
async def test_a_tier_of_another_protocol_is_left_alone(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # /v1/messages turns its request into one for chat and hands on its own raw request.
    serve = Served(chat_request, monkeypatch)
    await serve(chat_request(), {"service_tier": tier})
    assert len(serve.seen) == 1
