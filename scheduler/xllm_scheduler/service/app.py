"""The router's HTTP application: what generates goes to the gateway, the rest is FastAPI's."""

from __future__ import annotations

import contextlib
import functools
import hmac
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from xllm_plugins import __version__
from xllm_plugins.errors import ConfigError
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.batch import add_routes
from xllm_scheduler.service.config import RouterSection
from xllm_scheduler.service.console import PAGE
from xllm_scheduler.service.errors import ApiError, unauthorized
from xllm_scheduler.service.exchange import Exchange, Message, Receive, Send
from xllm_scheduler.service.gateway import GENERATES
from xllm_scheduler.service.load import Beat
from xllm_scheduler.service.openapi import document, json_body
from xllm_scheduler.service.probes import asked
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.router import CHANGEABLE, Service
from xllm_scheduler.service.routing import Role
from xllm_scheduler.service.turning import TurningError

_SHOWN = 20  # batches, those that are over among them


def build(section: RouterSection, classes: SchedulerSection) -> Any:
    """The ASGI application."""
    service = Service(section, classes)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="xllm router", version=__version__, lifespan=lifespan)
    app.openapi = functools.partial(document, app)  # type: ignore[method-assign]
    _add_public(app, service)
    _add_admin(app, service)
    if service.batches is not None:
        add_routes(app, service.batches, section.most_file_bytes)

    async def entry(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in GENERATES:
            await service.gateway(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith("/v1/"):
            exchange = Exchange(scope, receive, send)
            if service.gateway.refuses(exchange):
                await exchange.fail(unauthorized())
            else:
                await app(scope, receive, send)
        else:
            await app(scope, receive, send)

    entry.service = service  # type: ignore[attr-defined]
    return entry


def _add_public(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _response(error)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}."
        return _response(ApiError(error.status_code, what, headers=error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return _response(ApiError(400, f"{field}: {first['msg']}.", param=field))

    @app.get("/", include_in_schema=False)
    async def console() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8")

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        accepting = any(view.accepts for view in service.fleet.views(time.monotonic()))
        return Response(status_code=200 if accepting else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.seen.exposition(service.fleet), media_type="text/plain")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        listed: dict[str, dict[str, Any]] = {}
        for member in service.fleet.registry.members.values():
            for name in member.record.models:
                one = {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}
                listed.setdefault(name, {**one, "max_model_len": member.record.max_model_len})
        return JSONResponse({"object": "list", "data": list(listed.values())})

    @app.get("/xllm/v1/status")
    async def status() -> dict[str, Any]:
        return status_of(service)


def _add_admin(app: FastAPI, service: Service) -> None:
    async def admin(authorization: str = Header("")) -> None:
        token = service.section.admin_token
        given = authorization.removeprefix("Bearer ")
        if not token or not hmac.compare_digest(given.encode(), token.encode()):
            raise ApiError(
                401, "The admin token is missing or wrong.", "authentication_error",
                code="invalid_admin_token")  # fmt: skip

    def member(name: str) -> str:
        if name not in service.fleet.registry.members:
            known = ", ".join(service.fleet.registry.members) or "none"
            raise ApiError(404, f"There is no instance {name!r}; known are {known}.", param="name")
        return name

    only = [Depends(admin)]

    url = json_body({"url": {"type": "string", "format": "uri"}}, "url")

    @app.post("/xllm/v1/instances", dependencies=only, openapi_extra=url)
    async def add(request: Request) -> dict[str, str]:
        document = await _object_of(request)
        try:
            known = {k: v for k, v in document.items() if k in ("name", "role", "incarnation")}
            record = (
                Record.parsed(document)
                if document.get("models")
                else await asked(service.session, str(document.get("url", "")).rstrip("/"), **known)
            )
        except (ConfigError, TypeError) as error:
            raise ApiError(400, str(error)) from error
        if record is None:
            raise ApiError(
                400, f"url is {document.get('url')!r}, which does not answer.", param="url"
            )
        if document.get("models") and service.was_removed(record):
            what = f"The instance {record.name!r} was removed; it may come again under its url."
            raise ApiError(409, what, code="removed")
        await service.admit(record)
        return {"name": record.name}

    numbers = json_body({field: {"type": "number"} for field in Beat._fields})

    @app.post("/xllm/v1/instances/{name}/beat", dependencies=only, openapi_extra=numbers)
    async def beat(name: str, request: Request) -> dict[str, bool]:
        document = await _object_of(request)
        fields = {k: document[k] for k in Beat._fields if isinstance(document.get(k), (int, float))}
        incarnation = str(document.get("incarnation", ""))
        now_s = time.monotonic()
        known = service.fleet.beat(member(name), incarnation, Beat(**fields), now_s)
        step_time = document.get("step_time")
        if known and isinstance(step_time, dict):
            service.fleet.learned(name, step_time)
        return {"known": known}

    @app.delete("/xllm/v1/instances/{name}", dependencies=only)
    async def remove(name: str) -> dict[str, str]:
        await service.remove(member(name))
        return {"name": name}

    @app.post("/xllm/v1/instances/{name}/drain", dependencies=only)
    async def drain(name: str, drains: bool = True) -> dict[str, Any]:
        await service.drain(member(name), drains)
        return {"name": name, "draining": drains}

    @app.put("/xllm/v1/instances/{name}/role", dependencies=only)
    async def role(name: str, role: Role) -> dict[str, Any]:
        try:
            await service.change_role(member(name), role)
        except TurningError as error:
            raise ApiError(409, f"The role stays: {error}.") from error
        return {"name": name, "role": role.value}

    @app.get("/xllm/v1/requests/{request_id}", dependencies=only)
    async def explain(request_id: str) -> dict[str, Any]:
        found = service.fleet.decision(request_id)
        if found is None:
            raise ApiError(404, f"Nothing is known of request {request_id!r} any more.")
        return {
            "seconds_ago": time.monotonic() - found.at_s,
            "route": found.route._asdict(),
            "cached_tokens": dict(found.cached),
            "expected_tokens": found.expected,
            "ranks": dict(found.ranks),
        }

    @app.get("/xllm/v1/eplb", dependencies=only)
    async def experts() -> dict[str, Any]:
        return await service.experts.look()

    @app.get("/xllm/v1/kv/tiers", dependencies=only)
    async def tiers() -> dict[str, Any]:
        return await service.tiers.look()

    changes = json_body({name: {"type": ["string", "number"]} for name in CHANGEABLE})

    @app.put("/xllm/v1/settings", dependencies=only, openapi_extra=changes)
    async def settings(request: Request) -> dict[str, Any]:
        try:
            return await service.change_policies(await _object_of(request))
        except ConfigError as error:
            raise ApiError(400, str(error)) from error


def _response(error: ApiError) -> Response:
    headers = dict(error.headers)
    return Response(error.body(), error.status, headers, media_type="application/json")


async def _object_of(request: Request) -> dict[str, Any]:
    try:
        document = await request.json()
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ApiError(400, "The body is no JSON object.")
    return document


def status_of(service: Service) -> dict[str, Any]:
    """What is known of the instances and of the requests, as plain JSON types."""
    now_s = time.monotonic()
    fleet = service.fleet
    views = {view.instance_id: view for view in fleet.views(now_s)}
    return {
        "version": __version__,
        "routing": service.section.routing,
        "roles": service.section.roles,
        "instances": [
            {
                "name": name,
                "url": member.record.url,
                "models": list(member.record.models),
                "role": member.role.value,
                "health": member.health.value,
                "draining": member.draining,
                "accepts": views[name].accepts,
                "waiting": views[name].waiting,
                "running": views[name].running,
                "waiting_tokens": views[name].waiting_tokens,
                "kv_used": views[name].kv_used,
                "prefill_share": views[name].prefill_share,
            }
            for name, member in fleet.registry.members.items()
        ],
        "classes": {
            "online" if online else "offline": vars(tally) for online, tally in fleet.tally.items()
        },
        "index": fleet.index.facts(),
        "changes": [
            {"seconds_ago": now_s - at_s, "name": name, "role": role.value}
            for at_s, name, role in fleet.changes
        ],
        "recent": service.seen.recent(),
        "batches": service.batches.store.batches(_SHOWN) if service.batches else [],
    }
