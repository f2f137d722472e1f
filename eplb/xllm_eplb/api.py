"""What an instance's API server tells of its experts' loads, beside vLLM's own routes."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from xllm_eplb.command import WINDOWS_PATH
from xllm_plugins.compat import engine_status


def add_endpoints(app: FastAPI) -> None:
    """``GET /xllm/v1/eplb/windows?after=N``: the loads of plans after the Nth, first engine."""

    @app.get(WINDOWS_PATH)
    async def windows(request: Request, after: int = 0) -> JSONResponse:
        client = getattr(request.app.state, "engine_client", None)
        if client is None:
            return JSONResponse({"error": "This server has no engine."}, 503)
        found = (await engine_status.tell_engines(client, "eplb", {"after": after}))[0]
        return JSONResponse(found, 404 if "error" in found else 200)
