"""A stand-in for one vLLM server that speaks its protocol: for the router's speed and its faults.

Its answers are a function of all tokens before, so an answer that goes on elsewhere can be compared
with one that was never broken. It computes nothing:

    python -m benchmarks.lab.stub_engine --port 8000 --token-ms 5
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from aiohttp import web

from xllm_eplb.command import LOADS_PATH

_VOCABULARY = 1000
_REMEMBERED = 100  # requests
_OTHERS = ("/v1/responses", "/v1/messages", "/v1/embeddings")


def tokens_of(content: Any) -> list[int]:
    """The tokens of a prompt or of a chat: one for each byte, after a first one."""
    if isinstance(content, list) and all(type(token) is int for token in content):
        return content
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return [1, *(2 + byte for byte in text.encode())]


def generated(prompt: Sequence[int]) -> Iterator[int]:
    """What follows a prompt: each token depends on all before it."""
    state = 0
    for token in prompt:
        state = (state * 31 + token + 7) % 1_000_003
    while True:
        token = state % _VOCABULARY
        yield token
        state = (state * 31 + token + 7) % 1_000_003


def text_of(token: int) -> str:
    """A token's text."""
    return f" t{token}"


class StubEngine:
    """The server.

    Attributes:
        under_way: requests that are not answered in full.
        asked: the bodies and headers of the last requests.
        transfers: whether it offers KV to others.
        ends_at_once: whether prompts that are computed for others have no answer.
        stops_before_usage: whether streams break off behind their last token.
        refuses: whether it calls prompts too long that it computes for others.
        stuck: whether it is never done with those.
        busy: whether it takes no requests for now.
        moves_bytes: what it says that fetching KV moves; None for no count at all.
        cached: prompt tokens that it says it held; None to say nothing of it.
        eplb: what it tells of its experts' loads; None where it balances none.
        status: what it tells of its engines; None where it has no such path.

    Args:
        model: the name that it serves.
        token_ms: between two tokens.
        prompt_ms: to the first.
        key: that it wants; "" for none.
    """

    def __init__(self, model: str, token_ms: float, prompt_ms: float, key: str = "") -> None:
        self._model, self._token_s, self._prompt_s = model, token_ms / 1e3, prompt_ms / 1e3
        self.under_way = 0
        self.transfers = True
        self.ends_at_once = self.stops_before_usage = self.refuses = self.stuck = self.busy = False
        self.moves_bytes: int | None = None
        self._moved = 0
        self.cached: int | None = None
        self._key = key
        self.eplb: dict[str, Any] | None = None
        self.status: dict[str, Any] | None = None
        self._goes = asyncio.Event()
        self._goes.set()
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []  # bodies and headers

    def hang(self) -> None:
        """Answer nothing any more, and keep all connections."""
        self._goes.clear()

    def go_on(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._goes.set()

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=1 << 26, middlewares=[_refusing, self._checked])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics),
                web.get("/under_way", self._count),
                web.get(LOADS_PATH, self._loads),
                web.get("/xllm/v1/status", self._tell_status),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._complete),
                *(web.post(path, self._answer_otherwise) for path in _OTHERS),
            ]
        )
        return app

    @web.middleware
    async def _checked(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """The key, as vLLM checks it; and whether there is room."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and given != self._key and request.path != "/health":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.busy and request.method == "POST":
            return web.json_response({"error": {}}, status=503, headers={"retry-after": "7"})
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _health(self, request: web.Request) -> web.Response:
        await self._goes.wait()
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        one = {"id": self._model, "object": "model", "max_model_len": 100_000}
        return web.json_response({"object": "list", "data": [one]})

    async def _metrics(self, request: web.Request) -> web.Response:
        counted = 'vllm:nixl_bytes_transferred_sum{engine="0"} ' + f"{self._moved}\n"
        return web.Response(text="" if self.moves_bytes is None else counted)

    async def _count(self, request: web.Request) -> web.Response:
        return web.json_response({"under_way": self.under_way})

    async def _loads(self, request: web.Request) -> web.Response:
        await self._goes.wait()
        if self.eplb is None:
            return web.json_response({"error": "xllm.eplb is not active."}, status=404)
        return web.json_response(self.eplb)

    async def _tell_status(self, request: web.Request) -> web.Response:
        if self.status is None:
            raise web.HTTPNotFound
        return web.json_response(self.status)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": tokens_of(body.get("messages") or body["prompt"])})

    async def _body(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.asked.append((body, {k.lower(): v for k, v in request.headers.items()}))
        del self.asked[:-_REMEMBERED]
        return body

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        params = body.get("kv_transfer_params") or {}
        prompt = params.get("prompt_token_ids") or tokens_of(body["messages"])
        return await self._answered(request, body, prompt, chat=True)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._answered(request, body, tokens_of(body["prompt"]), chat=False)

    async def _answer_otherwise(self, request: web.Request) -> web.Response:
        """An answer whose form matters to nobody who asks here."""
        await self._body(request)
        return web.json_response({"object": request.path})

    async def _answered(
        self, request: web.Request, body: dict[str, Any], prompt: list[int], *, chat: bool
    ) -> web.StreamResponse:
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        params = body.get("kv_transfer_params") or {}
        if params.get("do_remote_prefill"):
            self._moved += self.moves_bytes or 0
        if params.get("do_remote_decode"):
            if self.refuses:
                raise ValueError("the prompt is too long")
            if self.stuck:
                await asyncio.Event().wait()
        self.under_way += 1
        try:
            await asyncio.sleep(self._prompt_s)
            if body.get("stream"):
                return await self._streamed(request, body, prompt, limit, chat=chat)
            await asyncio.sleep(self._token_s * (limit - 1))
            await self._goes.wait()
            return web.json_response(self._whole(body, prompt, limit, chat=chat))
        finally:
            self.under_way -= 1

    def _whole(
        self, body: dict[str, Any], prompt: list[int], limit: int, *, chat: bool
    ) -> dict[str, Any]:
        tokens = list(itertools.islice(generated(prompt), limit))
        text = "".join(map(text_of, tokens))
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **content, "finish_reason": "length"}
        made: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": [choice],
            "usage": self._usage(prompt, limit),
        }
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
            (made if chat else choice)["prompt_token_ids"] = prompt
        params = body.get("kv_transfer_params") or {}
        if self.ends_at_once and params.get("do_remote_decode"):
            choice["finish_reason"] = "stop"
        elif params.get("do_remote_decode") and self.transfers:
            made["kv_transfer_params"] = {"do_remote_prefill": True, "remote_block_ids": [1]}
        return made

    def _usage(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        made = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + tokens}
        details = None if self.cached is None else {"cached_tokens": self.cached}
        return {**made, "completion_tokens": tokens, "prompt_tokens_details": details}

    async def _streamed(
        self,
        request: web.Request,
        body: dict[str, Any],
        prompt: list[int],
        limit: int,
        *,
        chat: bool,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        head = {
            "id": uuid.uuid4().hex,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model,
        }
        told = bool(body.get("return_token_ids"))
        if chat:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            chunk = {**head, "choices": [{**first, "finish_reason": None}]}
            await _event(response, {**chunk, "prompt_token_ids": prompt} if told else chunk)
        for number, token in enumerate(itertools.islice(generated(prompt), limit), 1):
            if number > 1 and self._token_s:
                await asyncio.sleep(self._token_s)
            await self._goes.wait()
            text = text_of(token)
            choice: dict[str, Any] = {"index": 0}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            choice["finish_reason"] = "length" if number == limit else None
            if told:
                choice["token_ids"] = [token]
                if not chat and number == 1:
                    choice["prompt_token_ids"] = prompt
            await _event(response, {**head, "choices": [choice]})
        if self.stops_before_usage:
            assert request.transport is not None
            request.transport.abort()
            return response
        if (body.get("stream_options") or {}).get("include_usage"):
            await _event(response, {**head, "choices": [], "usage": self._usage(prompt, limit)})
        await response.write(b"data: [DONE]\n\n")
        return response


@web.middleware
async def _refusing(request: web.Request, handler: Any) -> web.StreamResponse:
    """Answer what cannot be with 400, as vLLM does."""
    try:
        answer: web.StreamResponse = await handler(request)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = {"message": repr(error), "type": "BadRequestError", "param": None, "code": 400}
        return web.json_response({"error": wrong}, status=400)
    return answer


async def _event(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--token-ms", type=float, default=0.0)
    parser.add_argument("--prompt-ms", type=float, default=0.0)
    options = parser.parse_args()
    engine = StubEngine(options.model, options.token_ms, options.prompt_ms)
    web.run_app(engine.app(), host="127.0.0.1", port=options.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
