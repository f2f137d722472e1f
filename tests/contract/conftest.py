"""Fixtures for the tests against a real vLLM."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.contract.engine import Clock

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# These tests import vLLM themselves.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tiny model's config, for :func:`tests.contract.engine.build`."""
    from tests.contract import engine

    engine.use_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the elastic scheduler, under the test's control."""
    from tests.contract.engine import Clock
    from xllm_scheduler.engine import scheduler

    stand_in = Clock()
    monkeypatch.setattr(scheduler, "time", stand_in)
    return stand_in
