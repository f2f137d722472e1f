"""A pytest plugin for whole upstream suites: our plugin loads as it does in vLLM's processes.

Where it is on the elastic scheduler also stands in the place of vLLM's. See ``suites.py``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MODES = WITHOUT, INSTALLED, ON = ("without", "installed", "on")
_PLUGIN = "plugin"  # the one for vLLM's scheduler tests; here there is no package of ours around it
# vllm-ascend's conftest has stand-ins for torch_npu of its own, which have to come first.
_LATE = importlib.util.find_spec("vllm_ascend") is not None
# Ours stands back from these of vllm-ascend.
_SCHEDULERS = ("recompute_scheduler", "scheduler_dynamic_batch", "scheduler_profiling_chunk")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of us there is, and the file for the outcomes."""
    parser.addoption("--mode", choices=MODES, required=True)
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before anything of the tests is imported."""
    early_config.pluginmanager.register(import_module(_PLUGIN).Recorder(), "recorder")
    sys.modules.setdefault("ray", ModuleType("ray"))  # some tests import it for clusters
    if not _LATE:
        _enter(early_config)


def pytest_sessionstart(session: pytest.Session) -> None:
    """After the first conftest, before the test modules are imported."""
    if _LATE:
        _enter(session.config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shorten the random tests."""
    import_module(_PLUGIN).pytest_collection_modifyitems(items)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the outcomes behind."""
    recorder: Any = config.pluginmanager.get_plugin("recorder")
    if recorder is not None:
        text = json.dumps(recorder.tests, indent=1)
        config.known_args_namespace.outcomes.write_text(text, encoding="utf-8")


def _enter(config: pytest.Config) -> None:
    from vllm.plugins import load_general_plugins

    options, shared = config.known_args_namespace, import_module(_PLUGIN)
    load_general_plugins()
    assert ("xllm_plugins.vllm_entry" in sys.modules) == (options.mode != WITHOUT)
    if options.mode == ON:
        for name in _SCHEDULERS if _LATE else ():
            import_module(f"vllm_ascend.core.{name}")  # which keep vLLM's class for a base
        settings = shared.settings(options.outcomes.parent, half_offline=False)
        recorder = config.pluginmanager.get_plugin("recorder")
        shared.substitute(recorder, settings, half_offline=False)
