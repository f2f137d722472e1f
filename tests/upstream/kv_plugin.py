"""A pytest plugin for vLLM's tests of its KV connectors: puts ours in their place. See ``kv.py``.

``OffloadingConnector`` is ``TiersConnector``, its manager, real or a test's, stands behind
``GatedManager``, and ``MultiConnector`` is ``XLLMConnector``. ``around`` makes whatever connector a
test's configuration names the one child of an ``XLLMConnector`` as well.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock

import pytest

THEIRS, OURS, AROUND = MODES = ("vllm", "ours", "around")
_MULTI = "MultiConnector"
_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_RUNNER = "tests.v1.kv_connector.unit.offloading_connector.utils"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The connectors to test."""
    parser.addoption("--connectors", choices=MODES, default=THEIRS)


@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Substitute before the tests import the classes."""
    mode = early_config.known_args_namespace.connectors
    if mode == THEIRS:
        return
    from xllm_kv.connector import XLLMConnector
    from xllm_kv.tiers.connector import TiersConnector

    recorder = early_config.pluginmanager.get_plugin("recorder")  # of plugin.py, loaded before
    for ours in (XLLMConnector, TiersConnector):
        _count(ours, recorder)
    multi: Any = import_module(f"{_V1}.multi_connector")
    multi.MultiConnector = XLLMConnector
    offloading: Any = import_module(f"{_V1}.offloading_connector")
    offloading.OffloadingConnector = TiersConnector
    _gate_managers()
    if mode == AROUND:
        _surround(XLLMConnector)


def _count(ours: Any, recorder: Any) -> None:
    def counted(original: Callable[..., Any], self: Any, *args: Any) -> Any:
        recorder.steps += 1
        return original(self, *args)

    _wrap(ours, "build_connector_meta", counted)


def _wrap(cls: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(cls, name, wrapped)


def _gate_managers() -> None:
    """Put every specification's manager behind ours, set so that it lets all through."""
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from xllm_kv.config import Admission, Stop
    from xllm_kv.prices import Prices
    from xllm_kv.tiers.manager import HOST, GatedManager

    class Gated(GatedManager):
        """Tests ask whether their manager is the mock that they gave."""

        __class__: Any = property(
            lambda self: MagicMock if isinstance(self._inner, MagicMock) else GatedManager
        )

    create = OffloadingSpecFactory.create_spec

    def create_spec(config: Any) -> Any:
        spec = create(config)
        get_theirs = spec.get_manager

        def get_manager() -> Any:
            inner = get_theirs()
            if isinstance(inner, MagicMock):
                inner.secondary_tiers = []
            return Gated(
                inner, None, Prices({HOST: (0.1, 5.0)}),
                priced=False, stop=Stop.WAIT, admission=Admission.PREDICTED, capacity=1,
                chunk_bytes=1,
            )  # fmt: skip

        spec.get_manager = get_manager
        return spec

    OffloadingSpecFactory.create_spec = create_spec

    def with_mock(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.manager = self.manager._inner  # told by tests what to answer, and asked what it got

    _wrap(import_module(_RUNNER).RequestRunner, "__init__", with_mock)


def _surround(ours: Any) -> None:
    """Make the connector that a configuration names the one child of ours."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    class Around(ours):  # type: ignore[misc]
        """Tests look into their connector: what ours has not, its child has."""

        def __getattr__(self, name: str) -> Any:
            if name == "_connectors":  # which it has not yet
                raise AttributeError(name)
            return getattr(self._connectors[0], name)

    create = KVConnectorFactory.create_connector

    def create_connector(config: Any, role: Any, kv_cache_config: Any) -> Any:
        own = config.kv_transfer_config
        if own.kv_connector == _MULTI:
            return create(config, role, kv_cache_config)
        given = {field.name: getattr(own, field.name) for field in fields(own)}
        child = {name: value for name, value in given.items() if name != "engine_id"}
        outer = copy.copy(config)
        outer.kv_transfer_config = copy.copy(own)
        outer.kv_transfer_config.kv_connector = _MULTI
        outer.kv_transfer_config.kv_connector_extra_config = {"connectors": [child]}
        return Around(outer, role, kv_cache_config)

    KVConnectorFactory.create_connector = create_connector
