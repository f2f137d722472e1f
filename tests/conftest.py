"""What all tests share: one hypothesis profile, and the skip of tests that need vLLM."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run; a shared machine may be slow, so no deadline.
settings.register_profile("xllm", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("xllm")
_SERVER_TEST_S = 1800.0  # of a test that starts servers; a busy machine takes minutes for one
_SERVERS = "tests/serve/"
_BESIDE = {f"{_SERVERS}test_{name}.py" for name in ("cluster", "kv", "router")}
_LONG_S = 60.0  # a test that takes longer is told of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("serve"):
            item.add_marker(pytest.mark.timeout(_SERVER_TEST_S))
    if hasattr(config, "workerinput"):  # by pytest-xdist; servers first, since they take longest
        items.sort(key=lambda item: item.get_closest_marker("serve") is None)
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("vllm") or item.get_closest_marker("serve"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files side by side, as what a module shares is made once; of whole servers two at a time."""
    from xdist.scheduler import LoadFileScheduling

    scheduler: Any = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope

    def scope(test: str) -> str:
        file: str = file_of(test)
        if file.startswith(_SERVERS):
            return "servers beside them" if file in _BESIDE else "servers"
        return file

    scheduler._split_scope = scope
    return scheduler


class AtOnce:
    """Says at once what failed and what took long; a run that is broken off shows nothing else."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed:
            terminal.write_line(f"\n{report.nodeid} failed:\n{report.longreprtext}")
        elif report.duration > _LONG_S:
            terminal.write_line(f"\n{report.nodeid}, {report.when}: {report.duration:.0f} s")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of which the controller tells
        config.pluginmanager.register(AtOnce(config))
