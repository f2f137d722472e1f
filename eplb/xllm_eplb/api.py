"""What an instance's API server tells of its experts' loads, beside vLLM's own routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from xllm_eplb.command import LOADS_PATH, WINDOWS_PATH
from xllm_plugins.compat import engine_status


def add_endpoints(app: FastAPI) -> None:
    """Of the first engine.

    ``GET /xllm/v1/eplb/windows?after=N``: the experts' loads of plans after the Nth.
    ``GET /xllm/v1/eplb/loads``: those of devices in the last window, and what was decided.
    """

    async def told(request: Request, command: Mapping[str, Any]) -> JSONResponse:
        client = getattr(request.app.state, "engine_client", None)
        if client is None:
            return JSONResponse({"error": "This server has no engine."}, 503)
        found = (await engine_status.tell_engines(client, "eplb", command))[0]
        return JSONResponse(found, 404 if "error" in found else 200)

    @app.get(WINDOWS_PATH)
    async def windows(request: Request, after: int = 0) -> JSONResponse:
        return await told(request, {"after": after})

    @app.get(LOADS_PATH)
    async def loads(request: Request) -> JSONResponse:
        return await told(request, {})
