"""Seam: carry what a client says of its request to the engine, and refuse bad values with a 400.

vLLM copies ``vllm_xargs`` into ``SamplingParams.extra_args`` but drops ``service_tier`` and HTTP
headers. The public serving methods are wrapped: what they are given is completed before they run.
``/v1/messages`` and ``/invocations`` call the same methods.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported
from xllm_plugins.errors import ConfigError

WHY = "service_tier and headers are accepted by vLLM's API and dropped before the engine."
WITHOUT = "xllm.scheduler is off."
HOLDS_FOR = ">=0.23,<0.33"
_OPENAI = "vllm.entrypoints.openai"
_CHAT = f"{_OPENAI}.chat_completion"
# Each with the versions in which it is known to be there; the last two are one that moved.
_METHODS = (
    (f"{_CHAT}.serving:OpenAIServingChat.create_chat_completion", ""),
    (f"{_OPENAI}.completion.serving:OpenAIServingCompletion.create_completion", ""),
    (f"{_OPENAI}.responses.serving:OpenAIServingResponses.create_responses", ""),
    (f"{_CHAT}.batch_serving:OpenAIServingChatBatch.create_batch_chat_completion", ""),
    ("vllm.entrypoints.serve.disagg.serving:ServingTokens.serve_tokens", "<0.24"),
    (
        "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
        ">=0.26",
    ),
)
SEAM = tuple(Target(path, ("self", "request", "raw_request"), only) for path, only in _METHODS)
# vLLM imports this module when it serves gRPC and only then; it moved between versions.
_GRPC = ("vllm.entrypoints.grpc_server", "vllm.entrypoints.launchers.grpc_server")


@dataclass(frozen=True)
class Said:
    """What a client said of one request, on whichever endpoint.

    Attributes:
        xargs: its ``vllm_xargs``.
        service_tier: OpenAI's field; None if it was left out.
        headers: of the HTTP request, by name in lower case.
        beam_search: vLLM's beam search makes sampling parameters of its own, without ``xargs``.
    """

    xargs: Mapping[str, Any] = field(default_factory=dict)
    service_tier: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    beam_search: bool = False


class RefusalError(ConfigError):
    """A request that cannot be served as it asks; ``param`` is the field or header at fault."""

    def __init__(self, message: str, param: str = "vllm_xargs") -> None:
        super().__init__(message)
        self.param = param


Complete = Callable[[Said], tuple[dict[str, Any], str | None]]


def install(complete: Complete) -> None:
    """Wrap the serving methods.

    Args:
        complete: given what a client said, returns the ``vllm_xargs`` that the engine shall see and
            the tier to name in the answer; raises ``RefusalError`` with the sentence that the
            client gets with status 400.
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
            try:
                xargs, served_tier = complete(await _said(request, raw_request))
            except RefusalError as refusal:
                return await _refuse(self, refusal, request, raw_request)
            if xargs:
                _carry(request, xargs)
            if served_tier is not None:
                # Responses repeats the request's tier in every answer, in stored and streamed too.
                _name_tier(request, served_tier)
            answer = await original(self, request, raw_request)
            if served_tier is not None:
                _name_tier(answer, served_tier)
            return answer

        return create

    for target in SEAM:
        module_name, _, qualname = target.path.partition(":")
        class_name, _, method = qualname.partition(".")

        def wrap(module: ModuleType, cls: str = class_name, method: str = method) -> None:
            patch(getattr(module, cls), method, make, "request_class")

        when_imported(module_name, wrap)


def bypassed_by() -> str:
    """The front end in use that does not run the wrapped methods; empty if none."""
    from vllm import envs

    # No configuration names the gRPC server: `vllm serve --grpc` reads the flag and forgets it.
    started = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    if not {started, *sys.modules}.isdisjoint(_GRPC):
        return "The gRPC server (--grpc)"
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        return "The Rust front end (VLLM_USE_RUST_FRONTEND)"
    return ""


async def _said(request: Any, raw_request: Any) -> Said:
    if raw_request is not None:
        # FastAPI has parsed this body already and keeps the result on the same request object. The
        # models of some protocols drop fields that stand in it.
        body, headers = await raw_request.json(), raw_request.headers
    else:
        fields = {"service_tier", "vllm_xargs"}
        body, headers = request.model_dump(include=fields, exclude_unset=True), {}
    xargs = getattr(request, "vllm_xargs", None)
    if xargs is None:
        xargs = body.get("vllm_xargs")
    if not isinstance(xargs, Mapping | None):
        raise RefusalError(f"vllm_xargs is {xargs!r}; allowed is a mapping.")
    params = getattr(request, "sampling_params", None)
    return Said(
        {**(xargs or {}), **(getattr(params, "extra_args", None) or {})},
        body.get("service_tier"),
        headers,
        getattr(request, "use_beam_search", False),
    )


def _carry(request: Any, xargs: dict[str, Any]) -> None:
    params = getattr(request, "sampling_params", None)
    if params is not None:  # /inference/v1/generate
        params.extra_args = xargs
    else:
        request.vllm_xargs = xargs


def _name_tier(holder: Any, tier: str) -> None:
    if "service_tier" in getattr(type(holder), "model_fields", ()):
        holder.service_tier = tier


async def _refuse(serving: Any, refusal: RefusalError, request: Any, raw_request: Any) -> Any:
    async def answer() -> Any:
        return serving.create_error_response(str(refusal), "BadRequestError", param=refusal.param)

    # A refused decode request must still free the blocks that a prefill instance holds for it.
    if getattr(request, "kv_transfer_params", None):
        return await serving._with_kv_transfer_rejection_cleanup(answer(), request, raw_request)
    return await answer()
