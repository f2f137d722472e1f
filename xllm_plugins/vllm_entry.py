"""vLLM's entry points: the general plugin that every process runs, and the endpoint plugin."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from xllm_plugins.compat import cli_option
from xllm_plugins.names import ENV_SELECTION

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger("vllm.xllm_plugins")

STATUS_PATH = "/xllm/v1/status"
_POLL_SECONDS = 1.0


def register() -> None:
    """Offer the command-line options; install the rest if plugins were chosen.

    vLLM calls this in every process, in child processes again. Nothing is imported or changed
    beyond the options until ``--plugins`` or ``XLLM_PLUGINS`` says so.
    """
    cli_option.install(_choose_plugins, _choose_config)
    if ENV_SELECTION in os.environ:
        from xllm_plugins import activation

        activation.choose_plugins(os.environ[ENV_SELECTION])


def _choose_plugins(text: str) -> None:
    from xllm_plugins import activation

    activation.choose_plugins(text)


def _choose_config(text: str) -> None:
    from xllm_plugins import activation

    activation.choose_config(text)


class StatusEndpoints:
    """``GET /xllm/v1/status``, and the poll that carries engine metrics to ``/metrics``."""

    name = "xllm"
    required_tasks = None

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def attach_router(self, app: FastAPI) -> None:
        """Add our route, if plugins were chosen."""
        if ENV_SELECTION not in os.environ:
            return

        @app.get(STATUS_PATH)
        async def status() -> dict[str, Any]:
            return await _status(getattr(app.state, "engine_client", None))

        from xllm_plugins.manager import registry

        for feature in registry().features().values():
            if feature.endpoints is not None:
                feature.endpoints(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start what only the first of the API servers runs, so that nothing is done twice."""
        from xllm_plugins.compat import engine_status

        if ENV_SELECTION not in os.environ or engine_client is None:
            return
        if engine_status.server_index(engine_client) == 0:
            self._tasks.append(asyncio.create_task(_poll_metrics(engine_client)))
            self._tasks += _feature_tasks(engine_client, args)


def _feature_tasks(engine_client: Any, args: Namespace) -> list[asyncio.Task[None]]:
    from xllm_plugins.activation import active_features, section_of

    config = engine_client.vllm_config
    return [
        asyncio.create_task(
            _served(feature.name, feature.serve(engine_client, args, section_of(feature, config)))
        )
        for feature in active_features(config)
        if feature.serve is not None
    ]


async def _served(name: str, work: Awaitable[None]) -> None:
    try:
        await work
    except Exception:
        logger.exception("xllm.%s has ended in this server", name)


async def _status(engine_client: Any) -> dict[str, Any]:
    from fastapi import HTTPException

    from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
    from xllm_plugins.compat import engine_status

    if engine_client is None:
        raise HTTPException(503, "This server has no engine.")
    additional = engine_client.vllm_config.additional_config
    report = additional[REPORT_KEY]
    settings = {
        f"{section}.{key}": {"value": value, "origin": report["origins"][f"{section}.{key}"]}
        for section, values in additional[SETTINGS_KEY].items()
        for key, value in values.items()
    }
    engines = await engine_status.ask_engines(engine_client)
    return {
        "features": report["features"],
        "settings": settings,
        "versions": report["versions"],
        "engines": [{name: one["facts"] for name, one in engine.items()} for engine in engines],
    }


async def _poll_metrics(engine_client: Any) -> None:
    from xllm_plugins.compat import engine_status
    from xllm_plugins.manager import registry
    from xllm_plugins.metrics import Exporter
    from xllm_plugins.status import samples_of

    exporter = Exporter(m for f in registry().features().values() for m in f.metrics)
    while True:
        try:
            for index, one in enumerate(await engine_status.ask_engines(engine_client)):
                exporter.update(index, samples_of(one))
        except Exception:
            # The engine may be dead or paused; vLLM reports that itself. Try again later.
            logger.exception("xLLM metrics could not be read from the engine")
            await asyncio.sleep(30 * _POLL_SECONDS)
        await asyncio.sleep(_POLL_SECONDS)
