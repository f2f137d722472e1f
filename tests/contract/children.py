"""Fresh Python processes, for tests of what plugins do to a process that loads them.

Importing vLLM takes seconds, so one child tries several things, each in a fork of its own.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 240


def run_child(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run a script in a fresh interpreter; returns the JSON in the last line that it prints.

    The child inherits the environment, without any choice of plugins, and ``env`` on top.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("XLLM_") and name != "VLLM_PLUGINS"
    }
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**inherited, **(env or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def forked(action: Callable[[], Any]) -> dict[str, Any]:
    """What ``action`` does in a fork of this process: its ``result``, or how it ended.

    Returns:
        ``result``, ``exit`` (the status of a ``SystemExit``), ``error`` and ``stderr``.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        answer: dict[str, Any] = {"result": None, "exit": None, "error": None}
        stderr = io.StringIO()
        try:
            with redirect_stderr(stderr):
                answer["result"] = action()
        except SystemExit as end:
            answer["exit"] = end.code
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shall see it
            answer["error"] = f"{type(error).__name__}: {error}"
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps({**answer, "stderr": stderr.getvalue()}))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.wait()
    answered: dict[str, Any] = json.loads(text)
    return answered


def fingerprints(prefix: str) -> dict[str, str]:
    """What every attribute of every loaded module under ``prefix``, and of its classes, is now."""
    found: dict[str, str] = {}
    for name, module in sorted(sys.modules.items()):
        if module is None or not f"{name}.".startswith(f"{prefix}."):
            continue
        for attribute, value in list(vars(module).items()):
            found[f"{name}:{attribute}"] = _fingerprint(value)
            if isinstance(value, type) and value.__module__ == name:
                for member, inner in list(vars(value).items()):
                    found[f"{name}:{value.__qualname__}.{member}"] = _fingerprint(inner)
    return found


def _fingerprint(value: Any) -> str:
    while isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    # Only looked at by its type: touching some of vLLM's lazy objects imports what they stand for.
    if isinstance(value, FunctionType):
        code = value.__code__
        return f"{value.__module__}.{value.__qualname__} {code.co_filename}:{code.co_firstlineno}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if isinstance(value, (str, int, float, NoneType)) else str(type(value))
