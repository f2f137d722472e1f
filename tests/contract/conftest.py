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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the elastic scheduler, under the test's control."""
    from tests.contract.engine import Clock
    from xllm_scheduler.engine.scheduler import ElasticMixin

    stand_in = Clock()
    monkeypatch.setattr(ElasticMixin, "wall_clock", stand_in)
    return stand_in
