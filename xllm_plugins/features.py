"""What a feature is, which ones the user selected, and the decision table that start-up prints."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from xllm_plugins.config import Mode, Section
from xllm_plugins.errors import ConfigError
from xllm_plugins.metrics import Metric
from xllm_plugins.status import Report

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

FAMILY = "xllm"


@dataclass(frozen=True)
class Attachment:
    """What a feature may read and steer while vLLM's configuration is being built.

    Attributes:
        engine_args: the user's arguments, to be read only.
        vllm_config: vLLM's finished configuration, which the feature may change.
        section: this feature's settings.
    """

    engine_args: EngineArgs
    vllm_config: VllmConfig
    section: Section


@dataclass(frozen=True)
class Feature:
    """One swappable part of vLLM.

    Attributes:
        name: the name behind ``xllm.`` and of the settings section.
        summary: what it does, one line.
        section: the dataclass of its settings.
        attach: changes ``vllm_config`` and returns what the feature attached to; raises
            ``NotAvailableError`` with the reason when it cannot or should not.
        prepare: given the user's engine arguments and the section, the arguments that vLLM shall
            build its configuration from instead; for what cannot be changed afterwards.
        check: looks at the settings alone and raises ``ConfigError`` if they name something that
            is not installed, ``NotAvailableError`` if by them the feature has nothing to do; also
            what ``xllm doctor`` asks.
        install: called in every process of vLLM in which the feature is selected, before there is
            a configuration; installs what other processes than the first need. May be called again.
        seams: names of the compat files it needs; one that does not hold switches it off.
        metrics: what it exports under ``xllm:``.
        report: given vLLM's engine core, in its process, says how it is; None for features that
            register a reporter of their own.
        tell: given vLLM's engine core and a command, in its process, does it and answers, all in
            plain types; None for features that take none.
        endpoints: adds routes to an API server; None for none.
        serve: given vLLM's engine client, the server's arguments and the section, runs in the first
            API server for as long as that serves; None for features without such work.
    """

    name: str
    summary: str
    section: type[Section]
    attach: Callable[[Attachment], str]
    prepare: Callable[[Any, Any], Mapping[str, Any]] | None = None
    check: Callable[[Any], None] = lambda section: None
    install: Callable[[], None] | None = None
    seams: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    report: Callable[[Any], Report] | None = None
    tell: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] | None = None
    endpoints: Callable[[Any], None] | None = None
    serve: Callable[[Any, Any, Any], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Policy:
    """A decision maker that a feature can use in place of its own.

    Attributes:
        kind: the interface it implements, for example ``scheduler.step``.
        name: the name that settings choose it by.
        factory: called with the feature's section, returns the policy.
    """

    kind: str
    name: str
    factory: Callable[[Any], Any]


@dataclass(frozen=True)
class Decision:
    """One row of the start-up table."""

    feature: str
    mode: str
    active: bool
    reason: str
    attached_to: str = ""


@dataclass(frozen=True)
class Selection:
    """Which features the user asked for."""

    text: str
    names: frozenset[str] = field(default_factory=frozenset)

    def __contains__(self, name: str) -> bool:
        return name in self.names


def parse_selection(text: str, known: Iterable[str]) -> Selection:
    """Read ``--plugins``: ``xllm``, ``xllm.NAME`` and ``-xllm.NAME``, separated by commas.

    Raises:
        ConfigError: an unknown name, or a selection that switches nothing on.
    """
    names = sorted(known)
    wanted: set[str] = set()
    dropped: set[str] = set()
    for token in filter(None, (part.strip() for part in text.split(","))):
        if token == FAMILY:
            wanted.update(names)
            continue
        target = dropped if token.startswith("-") else wanted
        family, _, name = token.removeprefix("-").partition(".")
        if family != FAMILY or name not in names:
            raise ConfigError(_unknown_token(token, names))
        target.add(name)
    if not wanted - dropped:
        raise ConfigError(
            f"--plugins is {text!r}, which switches nothing on; "
            f"allowed is xllm, xllm.NAME or xllm,-xllm.NAME with NAME of {', '.join(names)}."
        )
    return Selection(text, frozenset(wanted - dropped))


def _unknown_token(token: str, names: Sequence[str]) -> str:
    choices = [FAMILY, *(f"{FAMILY}.{n}" for n in names), *(f"-{FAMILY}.{n}" for n in names)]
    near = difflib.get_close_matches(token, choices, n=1, cutoff=0.0)
    return (
        f"--plugins names {token!r}, which is not known; the nearest is {near[0]}, "
        f"allowed are {', '.join(choices)}."
    )


def standing_reason(feature: Feature, section: Section, selection: Selection) -> str:
    """Why a feature stays off before its conditions are even looked at, or an empty text."""
    if feature.name not in selection:
        return "not selected"
    if section.mode is Mode.OFF:
        return f"{feature.name}.mode is off"
    return ""


def table(decisions: Sequence[Decision]) -> str:
    """The decision table as aligned text."""
    rows = [("feature", "mode", "active", "attached to", "why")]
    rows += [
        (d.feature, d.mode, "yes" if d.active else "no", d.attached_to or "-", d.reason)
        for d in decisions
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def as_report(decisions: Sequence[Decision]) -> list[Mapping[str, Any]]:
    """The table as plain JSON types."""
    return [asdict(d) for d in decisions]
