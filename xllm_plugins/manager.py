"""The one plugin manager: built-in parts and strangers come in by the same door."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

import pluggy

from xllm_plugins import hookspecs
from xllm_plugins.config import Section
from xllm_plugins.errors import ConfigError
from xllm_plugins.features import Feature, Policy

_T = TypeVar("_T")
logger = logging.getLogger("vllm.xllm_plugins")


@dataclass
class Registry:
    """What the loaded plugins offer.

    Attributes:
        hooks: pluggy's manager.
        failed: the plugins that could not be loaded, by name, with the error.
    """

    hooks: pluggy.PluginManager
    failed: dict[str, str] = field(default_factory=dict)

    def features(self) -> dict[str, Feature]:
        """All features by name, in the order in which plugins were loaded.

        Raises:
            ConfigError: two of them, or two of their metrics, have the same name.
        """
        found: dict[str, Feature] = {}
        metrics: set[str] = set()
        for feature in _flat(self.hooks.hook.xllm_features()):
            if feature.name in found:
                raise ConfigError(f"Two plugins bring a feature named {feature.name!r}.")
            found[feature.name] = feature
            for metric in feature.metrics:
                if metric.name in metrics:
                    raise ConfigError(f"Two features bring a metric named {metric.name!r}.")
                metrics.add(metric.name)
        return found

    def sections(self) -> dict[str, type[Section]]:
        """The settings section of each feature."""
        return {name: feature.section for name, feature in self.features().items()}

    def policy(self, kind: str, name: str) -> Policy:
        """The policy of one kind that settings name.

        Raises:
            ConfigError: none, or more than one, has that name.
        """
        offered = [p for p in _flat(self.hooks.hook.xllm_policies()) if p.kind == kind]
        matching: list[Policy] = [p for p in offered if p.name == name]
        if len(matching) == 1:
            return matching[0]
        names = ", ".join(sorted(p.name for p in offered))
        count = "no" if not matching else "more than one"
        raise ConfigError(f"There is {count} {kind} policy named {name!r}; installed are {names}.")


def new_registry() -> Registry:
    """An empty registry that knows the hooks."""
    hooks = pluggy.PluginManager(hookspecs.NAMESPACE)
    hooks.add_hookspecs(hookspecs)
    return Registry(hooks)


@functools.cache
def registry() -> Registry:
    """The registry of this process, with every installed plugin in it; loaded once."""
    made = new_registry()
    for entry in sorted(entry_points(group=hookspecs.NAMESPACE), key=lambda e: e.name):
        try:
            _add(made.hooks, entry)
        except Exception as error:
            made.failed[entry.name] = f"{type(error).__name__}: {error}"
            logger.exception("xllm plugin %s is off: it failed to load", entry.name)
    return made


def _add(hooks: pluggy.PluginManager, entry: EntryPoint) -> None:
    if hooks.has_plugin(entry.name):
        raise ConfigError(f"Another plugin is already named {entry.name!r}.")
    try:
        hooks.register(entry.load(), name=entry.name)
        hooks.check_pending()
        # Asked once here, so that a plugin whose hook fails is off, and not everything else.
        list(getattr(hooks.get_plugin(entry.name), "xllm_features", list)())
    except Exception:
        hooks.unregister(name=entry.name)
        raise


def _flat(results: Iterable[Iterable[_T]]) -> list[_T]:
    return [item for result in reversed(list(results)) for item in result]
