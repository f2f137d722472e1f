"""One attempt of a request: what each instance of its route is asked, and the answer on its way.

Where a prompt is computed at one instance and its answer generated at another one, the former
answers with where its KV lies, and the latter is asked for the whole with that.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from xllm_scheduler.service.call import (
    CACHED_TOKENS,
    CHAT,
    COMPLETION_TOKENS,
    Call,
    answer_headers,
    counted,
    header,
    is_stream,
    prefill_body,
    prompt_tokens_of,
)
from xllm_scheduler.service.connection import Connection
from xllm_scheduler.service.exchange import Exchange, Headers
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.relay import Stream, resumed_body, with_token_ids
from xllm_scheduler.service.routing import Route
from xllm_scheduler.service.upstream import Upstream
from xllm_scheduler.service.waiting import done_within

BUSY = frozenset({408, 429})  # no fault of an instance
_AGAIN = frozenset({*BUSY, 500, 502, 503, 504})


class UpstreamError(Exception):
    """An instance did not answer, or broke off; another one may.

    Attributes:
        instance: which.
        status: what it answered with; 0 if it did not.
        body: of such an answer.
        headers: likewise.
    """

    def __init__(
        self, instance: str, what: str, status: int = 0, body: bytes = b"", headers: Headers = ()
    ) -> None:
        super().__init__(what)
        self.instance, self.status, self.body, self.headers = instance, status, body, headers


class Attempts:
    """See the module.

    Args:
        fleet: is told what came.
        upstream: the connections to the instances.
        prefill_timeout_s: how long an instance may take that only computes a prompt.
    """

    def __init__(self, fleet: Fleet, upstream: Upstream, prefill_timeout_s: float) -> None:
        self._fleet, self._upstream = fleet, upstream
        self._prefill_timeout_s = prefill_timeout_s

    async def once(self, call: Call, route: Route, exchange: Exchange) -> None:
        """Try a request on a route, and hand its client what comes.

        Raises:
            UpstreamError: an instance failed it.
            ClientGoneError: as it says.
        """
        if call.stream is not None and call.stream.started:
            body = self._rest(call, call.stream)
        elif route.decode != route.prefill and call.divisible:
            computed = await self._prefilled(call, route, exchange)
            if computed is None:
                return
            body = computed
        elif call.movable:
            body = with_token_ids(call.body)
        else:
            body = call.body
        await self._relayed(call, route.decode, body, exchange)

    def _rest(self, call: Call, stream: Stream) -> bytes:
        chat = call.path.startswith(CHAT)
        asked = json.loads(call.body)
        made = resumed_body(asked, stream.prompt(), stream.delivered(), chat=chat)
        return json.dumps(made).encode()

    async def _prefilled(self, call: Call, route: Route, exchange: Exchange) -> bytes | None:
        """Have an instance compute the prompt; what is asked of the one that generates.

        Returns:
            None if the request was refused, and its client has been told so.
        """
        asked = json.loads(call.body)
        body = json.dumps(prefill_body(asked)).encode()
        status, headers, data = await self._computed(call, route.prefill, body)
        if status != 200:
            await self._told(call, exchange, status, headers, data)
            return None
        answer = json.loads(data)
        self._found(call, route.prefill, data)
        self._fleet.first_token(call.view.request_id)
        params = answer.get("kv_transfer_params")
        if params:
            call.computed_s = time.monotonic()
            tokens = prompt_tokens_of(answer)
            if tokens and call.path.startswith(CHAT):
                params = {**params, "prompt_token_ids": tokens}
            asked["kv_transfer_params"] = params
        elif _cut_short(answer):  # an answer that ends by itself has no KV to fetch
            self._fleet.cannot_transfer(route.prefill, time.monotonic())
        if call.movable:
            asked.setdefault("return_token_ids", True)
        return json.dumps(asked).encode()

    async def _computed(self, call: Call, name: str, body: bytes) -> tuple[int, Headers, bytes]:
        """What an instance answers that is to compute a prompt, if it does so in time."""
        found: list[tuple[int, Headers, bytes]] = []

        async def ask() -> None:
            async with self._asked(call, name, body) as answer:
                found.append((answer.status, answer.headers, await answer.body()))

        patience_s = self._prefill_timeout_s
        if not await done_within(patience_s, ask()):
            raise UpstreamError(name, f"{name} did not compute a prompt within {patience_s:g} s")
        return found[0]

    async def _relayed(self, call: Call, name: str, body: bytes, exchange: Exchange) -> None:
        async with self._asked(call, name, body) as answer:
            if call.stream is not None and is_stream(answer.headers):
                call.status = answer.status
                await self._streamed(call, call.stream, name, answer, exchange)
                return
            data = await answer.body()
            self._found(call, name, data)
            await self._told(call, exchange, answer.status, answer.headers, data)

    async def _told(
        self, call: Call, exchange: Exchange, status: int, headers: Headers, data: bytes
    ) -> None:
        """Hand a client an answer that is no stream."""
        call.status, call.tokens = status, counted(data, COMPLETION_TOKENS) or 0
        sent = answer_headers(headers, call.view.request_id)
        await exchange.start(status, [*sent, (b"content-length", b"%d" % len(data))])
        await exchange.end(data)

    async def _streamed(
        self,
        call: Call,
        stream: Stream,
        name: str,
        answer: Connection,
        exchange: Exchange,
    ) -> None:
        if not exchange.started:
            headers = answer_headers(answer.headers, call.view.request_id)
            await exchange.start(answer.status, headers)
        begun = False
        while data := await answer.part():
            out = stream.feed(data)
            if out:
                if not begun:  # also of one that goes on here
                    begun = True
                    self._first(call, time.monotonic())
                await exchange.write(out)
            if stream.error:
                raise UpstreamError(name, f"{name} failed in its answer", 500)
        # Anthropic's and Responses' streams have an end of their own, and no [DONE].
        if not stream.done and call.movable:
            raise UpstreamError(name, f"{name} broke off")
        call.tokens = stream.tokens
        self._found(call, name, stream.usage)
        await exchange.end()

    def _first(self, call: Call, now_s: float) -> None:
        """The first token has come, or the first after the answer has gone on elsewhere."""
        call.first_s = call.first_s or now_s
        self._fleet.first_token(call.view.request_id)
        if call.computed_s is not None:
            took_ms, call.computed_s = (now_s - call.computed_s) * 1e3, None
            self._fleet.moved(call.view.request_id, took_ms, now_s)

    def _found(self, call: Call, name: str, data: bytes) -> None:
        """Hold what an instance says that it had of a prompt against what was expected."""
        cached = counted(data, CACHED_TOKENS)
        if cached is not None:
            self._fleet.found(call.view, name, cached)

    @contextlib.asynccontextmanager
    async def _asked(self, call: Call, name: str, body: bytes) -> AsyncIterator[Connection]:
        """An instance's answer, once its head is there, unless another instance may do better."""
        member = self._fleet.registry.members.get(name)
        if member is None:
            raise UpstreamError(name, f"{name} has gone")
        headers = call.headers
        decision = self._fleet.decision(call.view.request_id)
        if decision is not None and name in decision.ranks:
            headers += header("x-data-parallel-rank", decision.ranks[name])
        try:
            answer = await self._upstream.post(member.record.url, call.path, headers, body)
            try:
                if answer.status in _AGAIN:
                    raise UpstreamError(
                        name, f"{name} answered {answer.status}", answer.status,
                        await answer.body(), answer_headers(answer.headers, call.view.request_id),
                    )  # fmt: skip
                yield answer
            finally:
                self._upstream.release(answer)
        except OSError as error:
            raise UpstreamError(name, f"{name} did not answer ({_named(error)})") from error


def _cut_short(answer: Mapping[str, Any]) -> bool:
    """Whether an answer would have gone on."""
    choices = answer.get("choices") or [{}]
    return bool(choices[0].get("finish_reason") == "length")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
