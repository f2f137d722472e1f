"""Seam: carry OpenAI's ``service_tier`` to the engine and refuse bad class fields with a 400.

vLLM copies ``vllm_xargs`` into ``SamplingParams.extra_args`` but drops ``service_tier``. The public
serving methods are wrapped: what they are given is completed before they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported
from xllm_plugins.errors import XllmError

WHY = "service_tier is accepted by vLLM's API and dropped before the engine."
HOLDS_FOR = ">=0.23,<0.33"
_OPENAI = "vllm.entrypoints.openai"
_METHODS = (
    (f"{_OPENAI}.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
    (f"{_OPENAI}.completion.serving", "OpenAIServingCompletion", "create_completion"),
    (f"{_OPENAI}.responses.serving", "OpenAIServingResponses", "create_responses"),
)
SEAM = tuple(
    Target(f"{module}:{cls}.{method}", ("self", "request", "raw_request"))
    for module, cls, method in _METHODS
)

Complete = Callable[[Mapping[str, Any], str | None], tuple[dict[str, Any], str | None]]


def install(complete: Complete) -> None:
    """Wrap the serving methods.

    Args:
        complete: given a request's ``vllm_xargs`` and ``service_tier``, returns the arguments that
            the engine shall see and the tier to name in the answer; raises ``XllmError`` with the
            sentence that the client gets with status 400.
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
            try:
                xargs, served_tier = complete(
                    getattr(request, "vllm_xargs", None) or {},
                    await _service_tier(request, raw_request),
                )
            except XllmError as error:
                return await _refuse(self, str(error), request, raw_request)
            if xargs:
                request.vllm_xargs = xargs
            answer = await original(self, request, raw_request)
            if served_tier is not None and "service_tier" in getattr(
                type(answer), "model_fields", ()
            ):
                answer.service_tier = served_tier
            return answer

        return create

    for module_name, class_name, method in _METHODS:

        def wrap(module: ModuleType, cls: str = class_name, method: str = method) -> None:
            patch(getattr(module, cls), method, make, "request_class")

        when_imported(module_name, wrap)


async def _service_tier(request: Any, raw_request: Any) -> str | None:
    """The tier that the client wrote, or None; requests of other protocols drop the field."""
    if raw_request is not None:
        # FastAPI has parsed this body already and keeps the result on the same request object.
        body = await raw_request.json()
        return body.get("service_tier") if isinstance(body, Mapping) else None
    if "service_tier" in request.model_fields_set:
        return str(request.service_tier)
    return (request.model_extra or {}).get("service_tier")


async def _refuse(serving: Any, message: str, request: Any, raw_request: Any) -> Any:
    async def answer() -> Any:
        return serving.create_error_response(message, "BadRequestError", param="vllm_xargs")

    # A refused decode request must still free the blocks that a prefill instance holds for it.
    cleanup = getattr(serving, "_with_kv_transfer_rejection_cleanup", None)
    return await cleanup(answer(), request, raw_request) if cleanup is not None else await answer()
