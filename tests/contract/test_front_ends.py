"""Front ends of vLLM that do not run the wrapped serving methods are named at start-up."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.v1.core.sched.scheduler import Scheduler

from xllm_plugins.compat import request_class
from xllm_plugins.features import Attachment
from xllm_scheduler import plugin
from xllm_scheduler.config import SchedulerSection

pytestmark = pytest.mark.vllm

GRPC = "The gRPC server (--grpc) passes by"
RUST = "The Rust front end (VLLM_USE_RUST_FRONTEND) passes by"


def attach() -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(runner_type="generate"),
        scheduler_config=SimpleNamespace(get_scheduler_cls=lambda: Scheduler),
    )
    args: Any = SimpleNamespace(scheduler_cls=None)
    plugin.attach(Attachment(args, config, SchedulerSection()))


@pytest.mark.parametrize(
    ("module", "rust", "line"),
    [
        ("", "0", ""),
        ("", "1", RUST),
        ("vllm.entrypoints.grpc_server", "0", GRPC),
        ("vllm.entrypoints.launchers.grpc_server", "0", GRPC),
    ],
)
@pytest.mark.parametrize("as_main", [False, True])
def test_a_front_end_that_drops_headers_and_tiers_is_named_in_one_line(
    module: str, rust: str, line: str, as_main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(request_class, "install", lambda complete: None)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", rust)
    if as_main:
        main = SimpleNamespace(__spec__=SimpleNamespace(name=module))
        monkeypatch.setitem(sys.modules, "__main__", main)
    elif module:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    attach()
    assert len(said) == bool(line)
    assert all(text.startswith(line) and "only vllm_xargs and priority" in text for text in said)


def test_vllm_imports_its_grpc_server_just_before_it_serves_with_it() -> None:
    # What the warning goes by.
    source = (Path(vllm.__path__[0]) / "entrypoints" / "cli" / "serve.py").read_text()
    assert re.search(r"from vllm\.entrypoints\.(launchers\.)?grpc_server import serve_grpc", source)
    assert not any(name.endswith(".grpc_server") for name in sys.modules)
