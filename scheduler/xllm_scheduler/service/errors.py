"""Errors as OpenAI's API says them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

_SOON = {"retry-after": "1"}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: what was wrong and what would be right.
        kind: OpenAI's ``type``.
        param: the field at fault.
        code: OpenAI's ``code``.
        headers: of the answer, beside its content's.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The answer's body."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def event(self) -> bytes:
        """The same within a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"


def unauthorized() -> ApiError:
    """No key, or a wrong one."""
    return ApiError(
        401, "The API key is missing or not known.", "authentication_error", code="invalid_api_key"
    )


def not_allowed(method: str) -> ApiError:
    """Another method than the path takes."""
    return ApiError(405, f"The method is {method}; allowed is POST.", headers={"allow": "POST"})


def too_large(limit: int) -> ApiError:
    """A body beyond the limit."""
    return ApiError(413, f"The body is longer than {limit} bytes, which is what is allowed.")


def overloaded(what: str) -> ApiError:
    """No room; come again."""
    return ApiError(429, what, "rate_limit_error", code="overloaded", headers=_SOON)


def unavailable(what: str) -> ApiError:
    """Nobody to serve it."""
    return ApiError(503, what, "service_unavailable", code="no_instance", headers=_SOON)


def no_model(model: str, known: list[str]) -> ApiError:
    """A model that nobody serves."""
    return ApiError(
        404,
        f"The model {model!r} is not served here; allowed are {', '.join(known) or 'none now'}.",
        "invalid_request_error",
        "model",
        "model_not_found",
    )
