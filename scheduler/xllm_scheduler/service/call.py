"""A client's request on its way, and what of it each hop is sent: bodies and headers; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_kv.index import Prompt
from xllm_scheduler.classes import Service
from xllm_scheduler.service.peek import Peek
from xllm_scheduler.service.relay import Stream
from xllm_scheduler.service.routing import RequestView

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
COMPLETION_TOKENS, CACHED_TOKENS = b"completion_tokens", b"cached_tokens"
_HOP = frozenset(
    {b"host", b"content-length", b"connection", b"transfer-encoding", b"keep-alive",
     b"accept-encoding", b"expect", b"x-request-id"}
)  # fmt: skip
_KEYS = (b"authorization", b"x-api-key")
_ANSWER_HOP = frozenset(
    {b"connection", b"transfer-encoding", b"keep-alive", b"content-length", b"date", b"server",
     b"x-request-id"}
)  # fmt: skip

# Images and sounds within a body, in base64.
_MEDIA = re.compile(rb'"(?:data:[^",]{1,100};base64,|data"\s*:\s*")[^"]*"')
_MEDIA_TOKENS = 1000  # what one of them may become
_TOKEN_BYTES = 4  # of text
_COUNT = re.compile(rb"\s*(\d+)")


@dataclass
class Call:
    """A request on its way.

    Attributes:
        path: where it goes, with the query.
        headers: for the instances, as lines.
        body: as it came.
        peek: what was read of it.
        service: its class and SLOs.
        view: what policies see.
        prompt: its tokens, if they are known.
        began_s: when it came.
        stream: what came of its answer; None if it is not streamed.
        failed: the instances that failed it.
        lost: the instance that was given up while it had the request; "" for none.
        sent_on: whether that instance has failed nothing, and is only to be emptied.
        first_s: when the first of the answer came.
        computed_s: when another instance was done with its prompt.
        tokens: of the answer.
        status: of the answer; 0 before it.
    """

    path: str
    headers: bytes
    body: bytes
    peek: Peek
    service: Service
    view: RequestView
    prompt: Prompt | None = None
    began_s: float = 0.0
    stream: Stream | None = None
    failed: list[str] = field(default_factory=list)
    lost: str = ""
    sent_on: bool = False
    first_s: float | None = None
    computed_s: float | None = None
    tokens: int = 0
    status: int = 0

    @property
    def movable(self) -> bool:
        """Whether its answer is asked for with token ids, to go on elsewhere."""
        return self.stream is not None and self.path.partition("?")[0] in (CHAT, COMPLETIONS)

    @property
    def single(self) -> bool:
        """Whether it has one prompt and one answer."""
        prompt = bytes(memoryview(self.peek.prompt)[:64]).translate(None, b" \t\r\n")
        several = prompt.startswith(b"[") and not prompt[1:2].isdigit()
        return self.peek.n in (None, 1) and not several

    @property
    def divisible(self) -> bool:
        """Whether its prompt can be computed at one instance and its answer at another one."""
        plain = not (self.peek.prompt_logprobs or self.peek.use_beam_search)
        return self.single and plain and self.path.partition("?")[0] in (CHAT, COMPLETIONS)

    @property
    def wants_usage(self) -> bool:
        """Whether its stream ends with how many tokens there were."""
        return bool((self.peek.stream_options or {}).get("include_usage"))


def prefill_body(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of the instance that only computes the prompt, as vLLM's NIXL connector wants.

    Args:
        asked: the client's body.
    """
    made = {k: v for k, v in asked.items() if k not in ("stream_options", "min_tokens")}
    names = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    params = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(names)}
    made |= {"stream": False, "max_tokens": 1, "return_token_ids": True}
    made["kv_transfer_params"] = {**(asked.get("kv_transfer_params") or {}), **params}
    if "max_completion_tokens" in made:
        made["max_completion_tokens"] = 1
    return made


def prompt_tokens_of(answer: Mapping[str, Any]) -> Sequence[int]:
    """The prompt's tokens as an answer tells them; empty if it does not."""
    if answer.get("prompt_token_ids"):
        tokens: Sequence[int] = answer["prompt_token_ids"]
        return tokens
    choices = answer.get("choices") or [{}]
    return choices[0].get("prompt_token_ids") or ()


def sent_headers(headers: Iterable[tuple[bytes, bytes]], request_id: str, key: str) -> bytes:
    """What an instance gets of a client's headers, as lines.

    Args:
        headers: the client's.
        request_id: the request's.
        key: what instances want in place of the client's own key; "" to pass that on.
    """
    made = [
        b"%b: %b\r\n" % pair
        for pair in headers
        if pair[0] not in _HOP and not (key and pair[0] in _KEYS)
    ]
    made.append(header("x-request-id", request_id))
    if key:
        made.append(header("authorization", f"Bearer {key}"))
    return b"".join(made)


def header(name: str, value: object) -> bytes:
    """One of our own, as a line."""
    return f"{name}: {value}\r\n".encode("latin-1")


def answer_headers(
    headers: Iterable[tuple[bytes, bytes]], request_id: str
) -> list[tuple[bytes, bytes]]:
    """What a client gets of an instance's headers."""
    made = [pair for pair in headers if pair[0] not in _ANSWER_HOP]
    return [*made, (b"x-request-id", request_id.encode("latin-1"))]


def tokens_in(body: bytes) -> int:
    """How many tokens a prompt that is not tokenised may have, from its bytes."""
    media = [found.end() - found.start() for found in _MEDIA.finditer(body)]
    return max(1, (len(body) - sum(media)) // _TOKEN_BYTES) + len(media) * _MEDIA_TOKENS


def is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether an answer is a stream of events."""
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower() == b"text/event-stream"


def counted(data: bytes, name: bytes) -> int | None:
    """A count that an answer's JSON tells, by its key; None if it does not."""
    start = data.rfind(b'"%b":' % name)
    if start < 0:
        return None
    found = _COUNT.match(data, start + len(name) + 3)
    return int(found[1]) if found else None
