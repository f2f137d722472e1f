"""An upstream that answers at once, for measuring what a router adds; ASGI and nothing else.

python -m uvicorn benchmarks.lab.fast_stub:app --port 9000 --no-access-log
"""

from __future__ import annotations

import json
from typing import Any

CHUNKS = 20
_HEAD = {"id": "cmpl-1", "created": 1, "model": "stub"}
_ANSWER = json.dumps(
    {**_HEAD, "object": "text_completion",
     "choices": [{"index": 0, "text": " word" * 20, "finish_reason": "length"}],
     "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}}
).encode()  # fmt: skip


def _chunk(number: int) -> bytes:
    choice: dict[str, Any] = {"index": 0, "text": " word", "token_ids": [number]}
    choice["finish_reason"] = "length" if number == CHUNKS - 1 else None
    made = {**_HEAD, "object": "text_completion", "choices": [choice]}
    return b"data: " + json.dumps(made, separators=(",", ":")).encode() + b"\n\n"


_EVENTS = [*map(_chunk, range(CHUNKS)), b"data: [DONE]\n\n"]
_PATHS = {
    "/health": b"",
    "/v1/models": json.dumps(
        {"object": "list", "data": [{"id": "stub", "object": "model", "max_model_len": 100000}]}
    ).encode(),
}
_JSON = [(b"content-type", b"application/json")]
_STREAM = [(b"content-type", b"text/event-stream")]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if b'"stream":true' in body or b'"stream": true' in body:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        for event in _EVENTS:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if scope["path"] == "/tokenize":
        tokens = list(range(len(body) // 6))
        answer = json.dumps({"tokens": tokens, "count": len(tokens)}).encode()
    else:
        answer = _PATHS.get(scope["path"], _ANSWER)
    headers = [*_JSON, (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
