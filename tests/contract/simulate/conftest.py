"""Simulated engines, one for each kind: vLLM takes seconds to make a configuration."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from xllm_plugins.compat import vllm_version

if TYPE_CHECKING:
    from xllm_scheduler.simulate.engine import Engine

PLAIN = {
    "model": "Qwen3-8B",
    "kv_gib": 20.0,
    "scheduler": "vllm-fcfs",
    "seconds": 10,
    "streams": [
        {
            "name": "chat",
            "slo": {"ttft_ms": 1000, "tpot_ms": 30},
            "arrivals": {"rate": 4},
            "prompt": {"mean": 300, "spread": 0.5},
            "output": {"mean": 30, "spread": 0.5},
        }
    ],
}
Write = Callable[..., Path]

collect_ignore_glob = (
    [] if importlib.util.find_spec("vllm") and vllm_version() != "0.23.0" else ["test_*.py"]
)


@functools.cache
def _engine(scheduler: str, arguments: tuple[tuple[str, Any], ...], kv_events: bool) -> Engine:
    from xllm_scheduler.simulate.engine import Engine, EngineSpec

    spec = EngineSpec(
        "Qwen3-8B", scheduler=scheduler, vllm=dict(arguments), kv_gib=20.0, kv_events=kv_events
    )
    return Engine(spec)


@pytest.fixture(scope="session")
def engine() -> Callable[..., Engine]:
    """Makes an engine of Qwen3-8B on one H200; the same one for the same arguments."""

    def made(scheduler: str = "vllm-fcfs", *, kv_events: bool = False, **arguments: Any) -> Engine:
        return _engine(scheduler, tuple(sorted(arguments.items())), kv_events)

    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a small scenario with some fields changed."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "scenario.yaml"
        path.write_text(yaml.safe_dump({**PLAIN, **changes}))
        return path

    return write
