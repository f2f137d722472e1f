"""A request's class and SLOs pass through vLLM's own serving methods and protocol classes."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from starlette.requests import Request
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion import protocol as chat
from vllm.entrypoints.openai.completion import protocol as completion
from vllm.entrypoints.openai.responses import protocol as responses
from vllm.sampling_params import BeamSearchParams

from xllm_plugins.compat import Target, is_patched, request_class, resolve_target, vllm_version
from xllm_scheduler.classes import complete_xargs
from xllm_scheduler.config import SchedulerSection

pytestmark = pytest.mark.vllm

MESSAGE = {"role": "user", "content": "Hello"}
OFFLINE = {"xllm_class": "offline"}
HERE = [
    target
    for target in request_class.SEAM
    if SpecifierSet(target.versions).contains(str(vllm_version()))
]


def target_of(method: str) -> Target:
    (found,) = (target for target in HERE if target.path.endswith(f".{method}"))
    return found


def chat_request(**fields: Any) -> Any:
    return chat.ChatCompletionRequest(model="m", messages=[MESSAGE], **fields)


def batch_request(**fields: Any) -> Any:
    return chat.BatchChatCompletionRequest(model="m", messages=[[MESSAGE], [MESSAGE]], **fields)


def completion_request(**fields: Any) -> Any:
    return completion.CompletionRequest(model="m", prompt="Hello", **fields)


def responses_request(**fields: Any) -> Any:
    return responses.ResponsesRequest(model="m", input="Hello", **fields)


def generate_request(vllm_xargs: Any = None, **fields: Any) -> Any:
    protocol = importlib.import_module(
        target_of("serve_tokens").path.partition(":")[0].replace(".serving", ".protocol")
    )
    params = {"max_tokens": 16, "extra_args": vllm_xargs}
    return protocol.GenerateRequest(token_ids=[1, 2], sampling_params=params, **fields)


def engine_sees(request: Any) -> list[Any]:
    """The extra arguments in the sampling parameters that vLLM makes of a request."""
    if hasattr(request, "sampling_params"):
        return [request.sampling_params.extra_args]
    singles = [request]
    if hasattr(request, "to_chat_completion_request"):
        singles = [request.to_chat_completion_request(one) for one in request.messages]
    return [single.to_sampling_params(16, {}).extra_args or None for single in singles]


@dataclass(frozen=True)
class Endpoint:
    """One serving method: how its request is made, and the class of its answer."""

    method: str
    new: Callable[..., Any]
    answer: Any = None


CHAT = Endpoint("create_chat_completion", chat_request, chat.ChatCompletionResponse)
COMPLETION = Endpoint("create_completion", completion_request, completion.CompletionResponse)
RESPONSES = Endpoint("create_responses", responses_request, responses.ResponsesResponse)
BATCH = Endpoint("create_batch_chat_completion", batch_request, chat.ChatCompletionResponse)
GENERATE = Endpoint("serve_tokens", generate_request)
ALL = [CHAT, COMPLETION, RESPONSES, BATCH, GENERATE]


def endpoints(*chosen: Endpoint) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("endpoint", chosen, ids=lambda one: one.method)


class Served:
    """A serving object of vLLM whose method records its request in place of generating."""

    def __init__(
        self, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, owner: Any = None
    ) -> None:
        self.seen: list[Any] = []
        self.answer: Any = object()
        if endpoint.answer is not None:
            self.answer = endpoint.answer.model_construct(service_tier=None)
        self.freed: list[str] = []
        self._method = endpoint.method
        wrapped = resolve_target(target_of(self._method).path.rpartition(".")[0])
        self._owner = owner or wrapped

        async def original(serving: Any, request: Any, raw_request: Any = None) -> Any:
            self.seen.append(request)
            return self.answer

        monkeypatch.setattr(wrapped, self._method, original)
        section = SchedulerSection(
            ttft_ms=800.0, tpot_ms=80.0, priority_tier_factor=0.5, objectives={"batch": "offline"}
        )
        request_class.install(lambda said: complete_xargs(said, section))
        assert is_patched(wrapped, self._method)

    async def notify_kv_transfer_request_rejected(
        self, request_id: str, *_: Any, **__: Any
    ) -> None:
        self.freed.append(request_id)

    def serving(self) -> Any:
        serving = self._owner.__new__(self._owner)
        serving.has_kv_connector = True
        serving.engine_client = self
        serving._merge_inline_system = False
        return serving

    async def __call__(
        self,
        request: Any,
        body: dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        method: str = "",
    ) -> Any:
        call = getattr(self.serving(), method or self._method)
        return await (call(request) if body is None else call(request, _raw(body, headers or {})))


def _raw(body: dict[str, Any], headers: Mapping[str, str]) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    # An ASGI server hands names on in lower case.
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": encoded}, receive)


def assert_refused(answer: Any, param: str, sentence: str) -> None:
    assert type(answer).__name__ == "ErrorResponse"
    assert (answer.error.code, answer.error.type) == (400, "BadRequestError")
    assert answer.error.param == param
    assert answer.error.message.startswith(sentence)


def test_every_serving_method_is_there_once() -> None:
    assert sorted(t.path.rpartition(".")[2] for t in HERE) == sorted(e.method for e in ALL)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.path)
def test_vllm_serves_with_a_coroutine_of_request_and_raw_request(target: Target) -> None:
    importlib.import_module(target.path.partition(":")[0])
    method = inspect.unwrap(resolve_target(target.path))
    assert inspect.iscoroutinefunction(method)
    parameters = inspect.signature(method).parameters
    assert tuple(parameters) == ("self", "request", "raw_request")
    assert parameters["raw_request"].default is None


@endpoints(CHAT, COMPLETION, RESPONSES)
def test_xargs_reach_the_engine(endpoint: Endpoint) -> None:
    request = endpoint.new()
    request.vllm_xargs = {"xllm_class": "offline", "xllm_ttft_ms": 400.0}
    assert engine_sees(request) == [{"xllm_class": "offline", "xllm_ttft_ms": 400.0}]


@endpoints(*ALL)
async def test_the_flex_tier_is_offline_and_is_named_in_the_answer(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    answer = await serve(endpoint.new(), {"service_tier": "flex"})
    (seen,) = serve.seen
    assert set(map(str, engine_sees(seen))) == {str(OFFLINE)}
    if endpoint.answer is not None:
        assert answer.service_tier == "flex"


@endpoints(CHAT, COMPLETION, RESPONSES, BATCH)
async def test_without_an_http_request_the_fields_speak(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # run-batch calls the methods so.
    serve = Served(endpoint, monkeypatch)
    answer = await serve(endpoint.new(service_tier="flex", vllm_xargs={"mine": 1}))
    assert engine_sees(serve.seen[0])[0] == {"mine": 1} | OFFLINE
    assert answer.service_tier == "flex"


@endpoints(*ALL)
async def test_the_priority_tier_tightens_the_slos(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    await serve(endpoint.new(vllm_xargs={"mine": 1}), {"service_tier": "priority"})
    assert engine_sees(serve.seen[0])[0] == {
        "mine": 1,
        "xllm_class": "online",
        "xllm_ttft_ms": 400.0,
        "xllm_tpot_ms": 40.0,
    }


@endpoints(*ALL)
async def test_headers_reach_the_engine_behind_the_requests_own_arguments(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    headers = {"X-LLM-D-Inference-Objective": "batch", "x-slo-ttft-ms": "300"}
    await serve(endpoint.new(), {}, headers)
    await serve(endpoint.new(vllm_xargs={"xllm_class": "online"}), {}, headers)
    assert [engine_sees(seen)[0] for seen in serve.seen] == [
        {"xllm_class": "offline", "xllm_ttft_ms": 300.0},
        {"xllm_class": "online", "xllm_ttft_ms": 300.0},
    ]


@endpoints(CHAT, COMPLETION, RESPONSES, BATCH)
@pytest.mark.parametrize(
    ("tier", "named"), [("auto", "default"), ("default", "default"), ("scale", "default")]
)
async def test_other_tiers_change_nothing_but_the_answer(
    endpoint: Endpoint, tier: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    answer = await serve(endpoint.new(), {"service_tier": tier})
    assert engine_sees(serve.seen[0])[0] is None
    assert answer.service_tier == named


@pytest.mark.parametrize(("tier", "named"), [("auto", "default"), ("priority", "priority")])
async def test_responses_names_the_tier_in_streams_and_stored_answers_too(
    tier: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It copies the tier of its request into each of them.
    serve = Served(RESPONSES, monkeypatch)
    await serve(responses_request(service_tier=tier), {"service_tier": tier})
    assert serve.seen[0].service_tier == named


@endpoints(*ALL)
@pytest.mark.parametrize("over_http", [True, False])
async def test_a_request_that_says_nothing_passes_as_it_is(
    endpoint: Endpoint, over_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    request = endpoint.new()
    before = repr(request)
    answer = await serve(request, {} if over_http else None, {"x-request-id": "7"})
    assert answer is serve.answer
    assert repr(serve.seen[0]) == before
    assert getattr(answer, "service_tier", None) is None


TIER = "service_tier is 'fast'; allowed is auto, default, flex"


@endpoints(*ALL)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("xargs", "body", "headers", "param", "sentence"),
    [
        (None, {"service_tier": "fast"}, {}, "service_tier", TIER),
        ({"xllm_class": "batch"}, {}, {}, "vllm_xargs", "xllm_class is 'batch'; allowed is onl"),
        ({"xllm_tpot_ms": 0}, {}, {}, "vllm_xargs", "xllm_tpot_ms is 0; allowed is a number of"),
        (None, {}, {"x-slo-ttft-ms": "-1"}, "x-slo-ttft-ms", "x-slo-ttft-ms is '-1'; allowed is"),
    ],
)
async def test_what_cannot_be_served_is_a_400_before_anything_streams(
    endpoint: Endpoint,
    stream: bool,
    xargs: dict[str, Any] | None,
    body: dict[str, Any],
    headers: dict[str, str],
    param: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = Served(endpoint, monkeypatch)
    request = endpoint.new(vllm_xargs=xargs, stream=stream)
    assert_refused(await serve(request, body, headers), param, sentence)
    assert serve.seen == []


@endpoints(CHAT, COMPLETION, RESPONSES, GENERATE)
@pytest.mark.parametrize("remote", [True, False])
async def test_a_refused_decode_request_frees_what_its_prefill_holds(
    endpoint: Endpoint, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    request = endpoint.new(request_id="r", kv_transfer_params={"do_remote_prefill": remote})
    assert_refused(await serve(request, {"service_tier": "fast"}), "service_tier", TIER)
    assert serve.freed == (["r"] if remote else [])


@endpoints(CHAT, COMPLETION)
async def test_beam_search_with_an_offline_class_is_refused_and_otherwise_left_alone(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    refusal = await serve(endpoint.new(use_beam_search=True), {"service_tier": "flex"})
    assert_refused(refusal, "use_beam_search", "use_beam_search is True, and vLLM carries no")
    assert serve.seen == []
    request = endpoint.new(use_beam_search=True, vllm_xargs={"mine": 1})
    assert await serve(request, {}) is serve.answer
    assert serve.seen[0].vllm_xargs == {"mine": 1}


def test_vllms_beam_search_carries_no_arguments() -> None:
    # Once it does, there is nothing to refuse.
    assert not hasattr(BeamSearchParams(beam_width=2, max_tokens=1), "extra_args")


@endpoints(*ALL)
async def test_a_stream_is_handed_through(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "data: {}"

    serve = Served(endpoint, monkeypatch)
    serve.answer = chunks()
    answer = await serve(endpoint.new(), {"service_tier": "flex"})
    assert answer is serve.answer
    assert [chunk async for chunk in answer] == ["data: {}"]


@pytest.mark.parametrize(
    ("body", "headers", "sees"),
    [
        ({"service_tier": "standard_only"}, {}, None),
        ({"service_tier": "flex"}, {}, OFFLINE),
        ({"vllm_xargs": {"xllm_ttft_ms": 300}}, {}, {"xllm_ttft_ms": 300}),
        ({}, {"x-gateway-inference-objective": "batch"}, OFFLINE),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_messages_are_served_through_the_method_for_chat(
    body: dict[str, Any],
    headers: dict[str, str],
    sees: Any,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = Served(CHAT, monkeypatch, owner=AnthropicServingMessages)
    serve.answer = serve.serving().create_error_response("that far and no further")
    body = {"model": "m", "max_tokens": 8, "messages": [MESSAGE], "stream": stream, **body}
    answer = await serve(AnthropicMessagesRequest(**body), body, headers, "create_messages")
    assert answer is serve.answer
    assert engine_sees(serve.seen[0]) == [sees]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_with_a_bad_value_is_refused_too(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(CHAT, monkeypatch, owner=AnthropicServingMessages)
    body = {"model": "m", "max_tokens": 8, "messages": [MESSAGE], "service_tier": "fast"}
    request = AnthropicMessagesRequest(**body, stream=stream)
    assert_refused(await serve(request, body, method="create_messages"), "service_tier", TIER)


async def test_generate_takes_vllm_xargs_behind_its_own_extra_args(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = Served(GENERATE, monkeypatch)
    body = {"vllm_xargs": {"xllm_class": "offline", "xllm_ttft_ms": 300}}
    await serve(generate_request({"xllm_ttft_ms": 400}), body)
    assert engine_sees(serve.seen[0]) == [{"xllm_class": "offline", "xllm_ttft_ms": 400}]


@endpoints(BATCH)
@pytest.mark.parametrize("xargs", ["xllm_class", 7, ["xllm_class"]])
async def test_arguments_that_are_no_mapping_are_refused_where_vllm_takes_any(
    endpoint: Endpoint, xargs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Served(endpoint, monkeypatch)
    refusal = await serve(endpoint.new(vllm_xargs=xargs), {"vllm_xargs": xargs})
    assert_refused(refusal, "vllm_xargs", f"vllm_xargs is {xargs!r}; allowed is a mapping.")
