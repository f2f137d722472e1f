"""A pytest plugin for vLLM's own tests: puts the elastic scheduler in place of vLLM's classes.

It replaces the names under which tests import a scheduler by what ``elastic_class`` makes of each,
and wraps methods of ``ElasticMixin`` to configure and to count. See ``compare.py``.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

THEIRS, OURS, HALF_OFFLINE = MODES = ("vllm", "elastic", "half-offline")
_CLASSES = {
    "vllm.v1.core.sched.scheduler": ("Scheduler",),
    "vllm.v1.core.sched.async_scheduler": ("AsyncScheduler",),
    "vllm.v1.core.sched.diffusion_scheduler": ("DiffusionScheduler", "DiffusionAsyncScheduler"),
}
_MOST_STEPS = 250  # of a random test; 20000 would take minutes


class Recorder:
    """What became of each test, and what our classes did in it.

    ``tests`` has for each: ``outcome``, ``steps`` that our classes scheduled, ``offline`` requests
    that they were given, and of a failure ``why`` and the file ``where`` it was raised.
    """

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.steps = 0
        self.offline = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called after set-up, call and tear-down; the first that did not pass decides."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "steps": 0, "offline": 0})
        if not report.passed and test["outcome"] == "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            test["outcome"] = report.outcome
            test["where"] = str(crash.path) if crash else ""
            test["why"] = f"{crash.path}:{crash.lineno}: {crash.message}" if crash else "skipped"
        test["steps"] += self.steps
        test["offline"] += self.offline
        self.steps = self.offline = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The classes to test, and the file for the outcomes."""
    parser.addoption("--scheduler", choices=MODES, default=THEIRS)
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Substitute before anything of the tests is imported; some of their conftests import them."""
    options = early_config.known_args_namespace
    recorder = Recorder()
    early_config.pluginmanager.register(recorder, "recorder")
    # Some tests import it for clusters, which they do without here.
    sys.modules.setdefault("ray", ModuleType("ray"))
    if options.scheduler != THEIRS:
        half_offline = options.scheduler == HALF_OFFLINE
        substitute(recorder, settings(options.outcomes.parent, half_offline), half_offline)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shorten the random tests."""
    for module in {item.getparent(pytest.Module) for item in items}:
        if module is not None and module.name.endswith("test_priority_scheduler_random.py"):
            module.obj.range = lambda *bounds: range(*bounds)[:_MOST_STEPS]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the outcomes behind."""
    recorder = config.pluginmanager.get_plugin("recorder")
    if isinstance(recorder, Recorder):
        text = json.dumps(recorder.tests, indent=1)
        config.getoption("--outcomes").write_text(text, encoding="utf-8")


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What some tests take from vLLM's main conftest, which needs far more than they do."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        yield caplog


def settings(folder: Path, half_offline: bool) -> dict[str, Any]:
    """The section ``scheduler``: as by default, but no priority makes a request offline.

    With offline requests there is always time for them: SLOs are far off and the machine is known
    to be fast. So tests fail by the order of the classes, and not because offline work has to wait.
    """
    from xllm_plugins.config import section_values
    from xllm_plugins.latency import TERMS, StepTime
    from xllm_scheduler.config import SchedulerSection

    plain = SchedulerSection(offline_above_priority=sys.maxsize, profile_dir="")
    if not half_offline:
        return section_values(plain)
    time = StepTime(
        base=1e-3, token=1e-6, decode=1e-6, error=0.0, ready=True, most_prefill_tokens=1 << 20
    )
    values = {field.name: getattr(time, field.name) for field in fields(time)}
    weight = 1e12  # nothing that is measured in a test changes it
    profile = {
        "step_time_ms": values,
        "gram": [[weight * (row == column) for column in range(TERMS)] for row in range(TERMS)],
        "moment": [weight * value for value in list(values.values())[:TERMS]],
    }
    path = folder / "fast.json"
    path.write_text(json.dumps({"profile": profile}), encoding="utf-8")
    return {**section_values(plain), "ttft_ms": 1e9, "tpot_ms": 1e9, "profile": str(path)}


def substitute(recorder: Recorder, settings: dict[str, Any], half_offline: bool) -> None:
    """Put the elastic scheduler of each class in its place."""
    from xllm_scheduler.engine.scheduler import ElasticMixin, elastic_class

    _wrap(ElasticMixin, "__init__", functools.partial(_configured, settings))
    _wrap(ElasticMixin, "schedule", functools.partial(_counted, recorder))
    _wrap(ElasticMixin, "update_from_output", functools.partial(_theirs_if_bare, ElasticMixin))
    if half_offline:
        _wrap(ElasticMixin, "add_request", functools.partial(_every_other_offline, recorder))
    # All are imported before the first is replaced: vLLM's own classes stay each other's bases.
    known = {name: names for name, names in _CLASSES.items() if find_spec(name)}
    for module, names in [(import_module(name), names) for name, names in known.items()]:
        for name in names:
            setattr(module, name, elastic_class(getattr(module, name)))


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(cls, name, wrapped)


def _configured(settings: dict[str, Any], original: Any, self: Any, *args: Any, **kw: Any) -> None:
    """Tests build a configuration that never went through our activation."""
    from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY

    base = next(cls for cls in type(self).__mro__ if cls.__module__ in _CLASSES)
    attached = f"{base.__module__}.{base.__qualname__}"
    feature = {"feature": "scheduler", "active": True, "attached_to": attached}
    vllm_config = kw["vllm_config"] if "vllm_config" in kw else args[0]
    vllm_config.additional_config.setdefault(SETTINGS_KEY, {"scheduler": settings})
    vllm_config.additional_config.setdefault(REPORT_KEY, {"features": [feature]})
    self.added_by_tests = 0
    original(self, *args, **kw)


def _theirs_if_bare(mixin: Any, original: Any, self: Any, *args: Any) -> Any:
    """One test makes a scheduler without its constructor: nothing of ours is there to be used."""
    if not hasattr(self, "added_by_tests"):
        return super(mixin, self).update_from_output(*args)
    return original(self, *args)


def _counted(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    recorder.steps += 1
    return original(self, *args, **kwargs)


def _every_other_offline(recorder: Recorder, original: Any, self: Any, request: Any) -> None:
    self.added_by_tests += 1
    if self.added_by_tests % 2 == 0 and request.sampling_params is not None:
        recorder.offline += 1
        # Tests share one object among requests.
        params = request.sampling_params = request.sampling_params.clone()
        params.extra_args = {**(params.extra_args or {}), "xllm_class": "offline"}
    original(self, request)
