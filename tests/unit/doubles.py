"""Real distributions, made on the spot, for tests of discovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

EntryPoints = Mapping[str, Mapping[str, str]]
"""Entry point group to name to ``module:attribute``."""

Install = Callable[[str, EntryPoints, Mapping[str, str]], Path]
"""``install(distribution, entry_points, {module: source})`` puts a distribution on ``sys.path``."""

FEATURE_MODULE = """
from dataclasses import dataclass
from xllm_plugins.config import Section, option
from xllm_plugins.features import Feature
from xllm_plugins.hookspecs import hookimpl

@dataclass(frozen=True)
class {cls}(Section):
    size: int = option(1, "a size", at_least=1)

@hookimpl
def xllm_features():
    return [Feature("{name}", "a stranger's", {cls}, lambda attachment: "here")]
"""


def feature_module(name: str) -> str:
    """The source of a plugin that brings one feature with one setting, ``size``."""
    return FEATURE_MODULE.format(name=name, cls=name.title() + "Section")


def write_distribution(
    folder: Path,
    name: str,
    entry_points: EntryPoints,
    modules: Mapping[str, str],
    version: str = "1.0",
) -> None:
    """Lay out an installed distribution as pip does."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {target}" for key, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
