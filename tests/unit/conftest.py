"""Unit tests start from a clean environment and a registry that is loaded anew."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.unit.doubles import EntryPoints, Install, write_distribution
from xllm_plugins.manager import registry


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in list(os.environ):
        if variable.startswith("XLLM_") or variable == "VLLM_PLUGINS":
            monkeypatch.delenv(variable)
    # Recorded now, so that what a test sets with os.environ itself is taken back too.
    for variable in ("XLLM_PLUGINS", "XLLM_CONFIG", "VLLM_PLUGINS"):
        monkeypatch.setenv(variable, "")
        os.environ.pop(variable)
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put real distributions on the path for one test."""
    installed: list[str] = []

    def install_one(name: str, entry_points: EntryPoints, modules: Mapping[str, str]) -> Path:
        folder = tmp_path / f"site-{len(list(tmp_path.iterdir()))}"
        write_distribution(folder, name, entry_points, modules)
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        registry.cache_clear()
        installed.extend(modules)
        return folder

    yield install_one
    for module in installed:
        sys.modules.pop(module, None)
