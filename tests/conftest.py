"""What all tests share: one hypothesis profile, and the skip of tests that need vLLM."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import settings

# The same examples in every run; a shared machine may be slow, so no deadline.
settings.register_profile("xllm", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("xllm")
_SERVER_TEST_S = 900.0  # of a test that starts a server; a busy machine takes minutes for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("serve"):
            item.add_marker(pytest.mark.timeout(_SERVER_TEST_S))
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("vllm") or item.get_closest_marker("serve"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
