"""Fixtures for the tests of vllm-ascend's Python without an NPU: `make ascend`."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm_ascend") is None:
    raise pytest.UsageError("tests/ascend run in an environment of their own: make ascend")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["XLLM_PLUGINS"] = "xllm"
os.environ["DYNAMIC_EPLB"] = "true"  # vllm-ascend asks for it beside its setting

from vllm.plugins import load_general_plugins

load_general_plugins()  # as vLLM does before anything else: now vllm-ascend's patches are in place
