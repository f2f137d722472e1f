"""Reaching into a module when it is imported, and what becomes of one that has changed."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

from xllm_plugins.compat.lazy import when_imported


def lost(module: ModuleType) -> None:
    raise AttributeError("it is gone")


@pytest.mark.parametrize("imported", [True, False])
def test_what_cannot_be_reached_into_is_named_and_imported_all_the_same(
    imported: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"upstream_{imported}".lower()
    (tmp_path / f"{name}.py").write_text("VALUE = 7\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    seen: list[str] = []
    if imported:
        importlib.import_module(name)
    when_imported(name, lost)
    when_imported(name, lambda module: seen.append(module.__name__))
    assert importlib.import_module(name).VALUE == 7
    assert seen == [name]
    assert f"xLLM could not reach into {name}" in caplog.text
    assert "it is gone" in caplog.text
    del sys.modules[name]
