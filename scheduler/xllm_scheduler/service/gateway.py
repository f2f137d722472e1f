"""Takes a client's request to instances and the answer back: route, send, relay, send on.

An ASGI application for the paths that generate. Before the first byte has gone to the client a
request may be sent again, elsewhere; after it, the answer goes on at another instance, if nothing
forbids that, from the tokens that the client already has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable
from typing import Any

from xllm_plugins.compat.request_class import RefusalError, Said
from xllm_scheduler.classes import classify, complete_xargs
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.attempt import BUSY, Attempts, UpstreamError
from xllm_scheduler.service.breaker import Backoff
from xllm_scheduler.service.call import (
    CHAT,
    COMPLETIONS,
    Call,
    sent_headers,
    tokens_in,
)
from xllm_scheduler.service.config import RouterSection
from xllm_scheduler.service.errors import (
    ApiError,
    no_model,
    not_allowed,
    overloaded,
    unauthorized,
    unavailable,
)
from xllm_scheduler.service.exchange import (
    ClientGoneError,
    Collected,
    Exchange,
    Message,
    Receive,
    Send,
    unless_gone,
)
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.peek import peek
from xllm_scheduler.service.relay import Stream, reason_to_stay
from xllm_scheduler.service.routing import RequestView, Route
from xllm_scheduler.service.seen import Seen
from xllm_scheduler.service.tokens import Tokens
from xllm_scheduler.service.upstream import Upstream
from xllm_scheduler.service.waiting import done_within

GENERATES = (CHAT, COMPLETIONS, "/v1/responses", "/v1/messages", "/v1/embeddings")
_UNKNOWN_TOKENS = 1 << 16  # of an answer without a limit
logger = logging.getLogger("xllm.router")


class Gateway:
    """See the module.

    Args:
        fleet: decides.
        section: the router's settings.
        classes: settings of class and SLOs.
        tokens: tokenises prompts.
        seen: is told what happened.
        upstream: the connections to the instances.
    """

    def __init__(
        self,
        fleet: Fleet,
        section: RouterSection,
        classes: SchedulerSection,
        tokens: Tokens,
        seen: Seen,
        upstream: Upstream,
    ) -> None:
        self._fleet, self._section, self._classes = fleet, section, classes
        self._tokens, self._seen = tokens, seen
        self._attempts = Attempts(fleet, upstream, section.prefill_timeout_s)
        self._backoff = Backoff()
        self._rng = random.Random()  # noqa: S311 - jitter
        self._keys = frozenset(filter(None, section.api_keys.split(",")))
        self._under_way = 0
        self._at: defaultdict[str, dict[str, tuple[Call, asyncio.Task[Any]]]] = defaultdict(dict)
        # Of the offline requests that wait for room, one of each model looks for it.
        self._offline_turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.changed = asyncio.Event()  # an instance has come or is free again

    def lose(self, instance: str) -> None:
        """An instance is given up: what it has under way is sent elsewhere."""
        for call, task in list(self._at.get(instance, {}).values()):
            call.lost = instance
            task.cancel()

    def empty(self, instance: str) -> None:
        """Send the offline requests of an instance elsewhere, if others take some."""
        views = self._fleet.views(time.monotonic())
        if not any(view.accepts for view in views if view.instance_id != instance):
            return
        for call, task in list(self._at.get(instance, {}).values()):
            begun = call.stream if call.stream is not None and call.stream.started else None
            if not (call.service.online or (begun is not None and self._stays(call, begun))):
                call.lost, call.sent_on = instance, True
                task.cancel()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request of a client."""
        exchange = Exchange(scope, receive, send)
        await self._answered(exchange, self._admitted(exchange))

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Serve a request of our own; status and body of the answer."""
        exchange = Collected(path, body)
        await self._answered(exchange, self._own(exchange))
        return exchange.status, exchange.answer

    def refuses(self, exchange: Exchange) -> bool:
        """Whether a client has no key that it needs."""
        return bool(self._keys) and _key_of(exchange) not in self._keys

    async def _own(self, exchange: Exchange) -> None:
        # After a restart instances that serve its model may still be joining.
        call = await self._call(exchange, self._section.queue_s)
        try:
            await self._serve(call, exchange)
        finally:
            self._fleet.dropped(call.view.request_id)

    async def _answered(self, exchange: Exchange, work: Awaitable[None]) -> None:
        """Do it, and answer with an error if it ends in one."""
        try:
            await work
        except ApiError as error:
            self._seen.refused(error.status)
            await exchange.fail(error)
        except RefusalError as refusal:
            self._seen.refused(400)
            await exchange.fail(ApiError(400, str(refusal), param=refusal.param))
        except ClientGoneError:
            return
        except Exception:
            logger.exception("a request for %s failed", exchange.path)
            self._seen.refused(500)
            if not exchange.ended:
                what = "The router failed; its log says why."
                await exchange.fail(ApiError(500, what, "server_error"))

    async def _admitted(self, exchange: Exchange) -> None:
        if exchange.method != "POST":
            raise not_allowed(exchange.method)
        if self.refuses(exchange):
            raise unauthorized()
        if self._under_way >= self._section.most_requests:
            raise overloaded(
                f"{self._under_way} requests are under way, which is as many as are allowed."
            )
        self._under_way += 1
        try:
            call = await self._call(exchange)
            try:
                if not await unless_gone(exchange, self._serve(call, exchange)):
                    self._seen.gone(call.service.online)
            finally:  # whatever ended it; of one that was answered there is nothing left
                self._fleet.dropped(call.view.request_id)
        finally:
            self._under_way -= 1

    async def _call(self, exchange: Exchange, patience_s: float = 0.0) -> Call:
        now_s = time.monotonic()
        body = await exchange.body(self._section.most_body_bytes)
        what = peek(body)
        said = Said(what.vllm_xargs or {}, what.service_tier, exchange.headers)
        filled, _ = complete_xargs(said, self._classes)
        service = classify(filled, what.priority or 0, self._classes)
        await self._known_model(what.model, patience_s)
        request_id = exchange.headers.get("x-request-id") or uuid.uuid4().hex
        if self._fleet.is_under_way(request_id):  # clients need not be careful with names
            request_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        prompt = None
        if self._fleet.routing.reads_cached:
            prompt = await self._tokens.prompt(exchange.path, what)
        view = RequestView(
            request_id,
            service.online,
            len(prompt.tokens) if prompt else tokens_in(body),
            service.ttft_ms if service.online else math.inf,
            service.tpot_ms if service.online else math.inf,
            what.most_tokens or _UNKNOWN_TOKENS,
            session=exchange.headers.get("x-session-id") or what.session_id or what.user or "",
        )
        path = exchange.path + (f"?{exchange.query.decode('latin-1')}" if exchange.query else "")
        stream = Stream(strip=not what.return_token_ids) if what.stream else None
        headers = sent_headers(exchange.raw_headers, request_id, self._section.instance_key)
        return Call(path, headers, body, what, service, view, prompt, now_s, stream)

    async def _known_model(self, model: str, patience_s: float) -> None:
        until_s = time.monotonic() + patience_s
        while True:
            members = self._fleet.registry.members.values()
            if not model or not members or any(model in m.record.models for m in members):
                return
            if not await self._another(until_s):
                raise no_model(model, sorted({name for m in members for name in m.record.models}))

    async def _another(self, until_s: float) -> bool:
        """Wait for an instance to come or to be free, a second at most; False if it is too late."""
        left_s = until_s - time.monotonic()
        if left_s <= 0.0:
            return False
        self.changed.clear()
        await done_within(min(1.0, left_s), self.changed.wait())
        return True

    async def _serve(self, call: Call, exchange: Exchange) -> None:
        attempt = 0
        while True:
            route = await self._place(call)
            try:
                await self._tried(call, route, exchange)
            except UpstreamError as error:
                if call.sent_on:
                    self._resumed(call)
                    continue
                attempt += 1
                self._note_failure(call, error)
                if await self._ends(call, exchange, error, attempt):
                    return
                await asyncio.sleep(self._backoff.delay_s(attempt, self._rng))
                continue
            if call.status >= 400:
                self._fleet.dropped(call.view.request_id)
                self._seen.refused(call.status)
                return
            self._fleet.finished(call.view, call.tokens, time.monotonic())
            self.changed.set()
            self._seen.finished(call.service, call.began_s, call.first_s, call.tokens)
            return

    async def _tried(self, call: Call, route: Route, exchange: Exchange) -> None:
        """Have it served, unless an instance that has it is given up."""
        task = asyncio.current_task()
        assert task is not None
        names, request_id = {route.prefill, route.decode}, call.view.request_id
        for name in names:
            self._at[name][request_id] = (call, task)
        try:
            await self._attempts.once(call, route, exchange)
        except asyncio.CancelledError:
            if not call.lost or exchange.left:
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            lost, call.lost = call.lost, ""
            raise UpstreamError(lost, f"{lost} does not answer any more") from None
        finally:
            for name in names:
                self._at[name].pop(request_id, None)
                if not self._at[name]:
                    del self._at[name]

    def _resumed(self, call: Call) -> None:
        """It goes on elsewhere, though nothing has failed it."""
        call.sent_on = False
        self._fleet.dropped(call.view.request_id)
        if call.stream is not None:
            if call.stream.started:
                self._seen.moved()
            call.stream.resume()

    def _note_failure(self, call: Call, error: UpstreamError) -> None:
        now_s = time.monotonic()
        call.failed.append(error.instance)
        self._seen.failed(error.instance)
        if error.status in BUSY:
            self._fleet.dropped(call.view.request_id)
            return
        self._fleet.failed(call.view.request_id, error.instance, now_s)
        if not error.status:
            self._fleet.unanswered(error.instance, now_s)

    async def _ends(
        self, call: Call, exchange: Exchange, error: UpstreamError, attempt: int
    ) -> bool:
        """Whether a request that an instance failed is over; else it is ready to be sent again."""
        stream = call.stream
        if stream is not None and stream.started:
            if stream.finished and call.single:
                await exchange.end(stream.ending(usage=call.wants_usage))
                return True
            stay = self._stays(call, stream)
            if stay or attempt > self._section.retries:
                why = stay or f"{attempt} instances failed it"
                await exchange.fail(
                    ApiError(502, f"{error}; the answer cannot go on: {why}.", "server_error")
                )
                return True
            stream.resume()
            self._seen.moved()
            return False
        if stream is not None:
            stream.resume()
        if attempt > self._section.retries:
            if error.status:
                await exchange.start(error.status, error.headers)
                await exchange.end(error.body)
                return True
            raise ApiError(502, f"{error}, and neither did others.", "server_error")
        return False

    def _stays(self, call: Call, stream: Stream) -> str:
        if not call.movable:
            return f"{call.path} is not among those that can"
        if not stream.prompt():
            return "the instance did not tell the prompt's tokens"
        if stream.called:
            return "a tool call has begun"
        return reason_to_stay(json.loads(call.body))

    async def _place(self, call: Call) -> Route:
        """A route, as soon as an instance accepts; for offline requests, as soon as one has room.

        Raises:
            ApiError: none does for as long as online requests may wait.
        """
        if call.service.online:
            return await self._placed(call, self._section.queue_s)
        async with self._offline_turns[call.peek.model]:
            return await self._placed(call, math.inf)

    async def _placed(self, call: Call, patience_s: float) -> Route:
        until_s = time.monotonic() + patience_s
        while True:
            now_s = time.monotonic()
            route = self._fleet.place(
                call.view, now_s, prompt=call.prompt, model=call.peek.model, without=call.failed
            )
            if route is None and call.failed:
                # Better one that has failed it once than none.
                route = self._fleet.place(
                    call.view, now_s, prompt=call.prompt, model=call.peek.model
                )
            if route is not None:
                return route
            if not await self._another(until_s):
                raise unavailable("No instance takes requests now.")


def _key_of(exchange: Exchange) -> str:
    bearer = exchange.headers.get("authorization", "")
    return bearer.removeprefix("Bearer ") or exchange.headers.get("x-api-key", "")
