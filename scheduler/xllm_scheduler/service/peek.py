"""What a router has to know of a request's body, and no more of it than that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from xllm_plugins.compat.request_class import RefusalError


class Peek(msgspec.Struct):
    """The fields of a body that decide; the others are left as they stand."""

    model: str = ""
    stream: bool | None = None
    stream_options: Mapping[str, Any] | None = None
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    chat_template_kwargs: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    use_beam_search: bool | None = None
    prompt_logprobs: int | bool | None = None
    priority: int | None = None
    service_tier: str | None = None
    vllm_xargs: Mapping[str, Any] | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: Mapping[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens may be generated; None for as many as fit."""
        for value in (self.max_completion_tokens, self.max_output_tokens, self.max_tokens):
            if value is not None:
                return value
        return None

    @property
    def templated(self) -> dict[str, bytes]:
        """What else its chat template reads, as it stands."""
        names = ("tools", "chat_template_kwargs")
        found = {name: bytes(getattr(self, name)) for name in names}
        return {name: raw for name, raw in found.items() if raw not in (b"", b"null")}


_DECODER = msgspec.json.Decoder(Peek)


def peek(body: bytes) -> Peek:
    """Read what decides.

    Raises:
        RefusalError: it is no JSON object, or a field has a wrong type; names it.
    """
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        what, _, path = message.partition(" - at `$.")
        field = path.rstrip("`").partition(".")[0].partition("[")[0]
        raise RefusalError(f"{field or 'The body'}: {what}.", field or "body") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusalError(f"The body is not valid JSON: {error}.", "body") from error
