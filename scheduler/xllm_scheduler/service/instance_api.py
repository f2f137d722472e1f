"""What an instance's API server answers to routers, beside vLLM's own routes."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from xllm_plugins.activation import active_features, section_of
from xllm_plugins.compat import engine_status
from xllm_scheduler.service.member import KV_PATH, ROLE_PATH, ServiceSection
from xllm_scheduler.service.routing import Role


def add_endpoints(app: FastAPI) -> None:
    """What a router tells an instance to do, and asks it; both want the token.

    ``PUT /xllm/v1/role``: become prefill, decode or mixed. ``GET /xllm/v1/kv?rank=N``: the blocks
    that a data-parallel rank holds, as :class:`xllm_kv.snapshot.Snapshot` on the wire.
    """

    @app.put(ROLE_PATH)
    async def role(request: Request) -> JSONResponse:
        refused = _refused(request)
        if refused is not None:
            return refused
        try:
            wanted = Role((await request.json())["role"])
        except (ValueError, KeyError, TypeError):
            allowed = ", ".join(one.value for one in Role)
            return JSONResponse({"error": f"role is missing or wrong; allowed are {allowed}."}, 400)
        engines = await _told(request, {"role": wanted.value})
        return JSONResponse({"role": wanted.value, "engines": engines})

    @app.get(KV_PATH)
    async def kv(request: Request, rank: int = 0) -> Response:
        refused = _refused(request)
        if refused is not None:
            return refused
        for answer in await _told(request, {"snapshot_of": rank}):
            if "snapshot" in answer:
                return Response(answer["snapshot"], media_type="application/msgpack")
        return JSONResponse({"error": f"No rank {rank} here publishes KV events."}, 404)


def _refused(request: Request) -> JSONResponse | None:
    """The answer to who may not ask; None for routers."""
    client = getattr(request.app.state, "engine_client", None)
    features = active_features(client.vllm_config) if client is not None else []
    service = next((feature for feature in features if feature.name == "service"), None)
    if client is None or service is None:
        return JSONResponse({"error": "xllm.service is not active."}, 404)
    section = section_of(service, client.vllm_config)
    assert isinstance(section, ServiceSection)
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not section.token or not hmac.compare_digest(given.encode(), section.token.encode()):
        return JSONResponse({"error": "The token is missing or wrong."}, 401)
    return None


async def _told(request: Request, command: dict[str, Any]) -> list[dict[str, Any]]:
    return await engine_status.tell_engines(request.app.state.engine_client, "service", command)
