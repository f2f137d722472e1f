"""What an instance's API server answers to routers, beside vLLM's own routes."""

from __future__ import annotations

import hmac

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from xllm_plugins.activation import active_features, section_of
from xllm_plugins.compat import engine_status
from xllm_scheduler.service.member import ROLE_PATH, ServiceSection
from xllm_scheduler.service.routing import Role


def add_endpoints(app: FastAPI) -> None:
    """``PUT /xllm/v1/role``: what a router tells an instance to do; wants the token."""

    @app.put(ROLE_PATH)
    async def role(request: Request) -> JSONResponse:
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
        try:
            wanted = Role((await request.json())["role"])
        except (ValueError, KeyError, TypeError):
            allowed = ", ".join(one.value for one in Role)
            return JSONResponse({"error": f"role is missing or wrong; allowed are {allowed}."}, 400)
        engines = await engine_status.tell_engines(client, "service", {"role": wanted.value})
        return JSONResponse({"role": wanted.value, "engines": engines})
