"""Run a function when a module has been imported, without importing it ourselves.

One that fails is logged and left at that: what it would patch may be gone from a new upstream, the
features that need it are then off, and everybody else's import goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

Action = Callable[[ModuleType], None]
logger = logging.getLogger("vllm.xllm_plugins")


class _Loader(Loader):
    """The real loader, with our actions after it."""

    def __init__(self, real: Loader, actions: Sequence[Action]) -> None:
        self._real = real
        self._actions = actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        module.__loader__ = self._real
        self._real.exec_module(module)
        for action in self._actions:
            _run(action, module)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.pending: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Taken out before the search, so that it finds the real loader and not this one.
        actions = self.pending.pop(fullname, None)
        if actions is None:
            return None
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, actions)
        return spec


_finder = _Finder()


def _run(action: Action, module: ModuleType) -> None:
    try:
        action(module)
    except Exception:
        logger.exception("xLLM could not reach into %s, which stays as it is", module.__name__)


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` now if the module ``name`` is imported, else when it will be."""
    module = sys.modules.get(name)
    if module is not None:
        _run(action, module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.pending.setdefault(name, []).append(action)
