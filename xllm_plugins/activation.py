"""From the user's choice to features attached to one vLLM configuration."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from xllm_plugins import status
from xllm_plugins.compat import (
    distribution_version,
    engine_config,
    engine_status,
    inspect_seam,
    vllm_version,
)
from xllm_plugins.config import (
    Mode,
    Section,
    Settings,
    Source,
    is_secret,
    parse_section,
    resolve,
    section_values,
    source_from_environment,
    source_from_text,
)
from xllm_plugins.errors import ConfigError, FeatureError, NotAvailableError
from xllm_plugins.features import (
    Attachment,
    Decision,
    Feature,
    Selection,
    as_report,
    parse_selection,
    standing_reason,
    table,
)
from xllm_plugins.manager import registry
from xllm_plugins.names import ENTRY_POINT, ENV_ALLOW_LIST, ENV_CONFIG, ENV_SELECTION

logger = logging.getLogger("vllm.xllm_plugins")

SETTINGS_KEY = "xllm"
REPORT_KEY = "xllm_report"
_ENDPOINTS = "vllm.endpoint_plugins"
# vLLM loads it unasked but lets it download adapters only where an operator's list names it.
_BY_NAME_ONLY = frozenset({"lora_hf_hub_resolver"})


def choose_plugins(text: str) -> None:
    """Take ``--plugins``: check it, hand it to child processes, and switch on.

    Raises:
        ConfigError: the selection names something unknown, or nothing.
    """
    parse_selection(text, registry().features())
    os.environ[ENV_SELECTION] = text
    os.environ[ENV_ALLOW_LIST] = allow_list(os.environ.get(ENV_ALLOW_LIST))
    activate()


def choose_config(text: str) -> None:
    """Take ``--xllm-config``: check it and hand it to child processes.

    Raises:
        ConfigError: it cannot be read, or holds an unknown key, a wrong type or a bad value.
    """
    resolve(registry().sections(), [source_from_text(text)])
    inline = text.lstrip().startswith("{")
    os.environ[ENV_CONFIG] = text if inline else str(Path(text).expanduser().absolute())
    activate()


def allow_list(current: str | None) -> str:
    """``VLLM_PLUGINS`` with our endpoint plugin on it and nobody else hidden.

    vLLM reads one list of names for all of its plugin groups, and loads endpoint plugins only when
    the list names them. Unset, it becomes every installed name, aside from other people's endpoint
    plugins and what being named would switch on; set, ours is appended.
    """
    if current is not None:
        names = [name.strip() for name in current.split(",") if name.strip()]
    else:
        names = sorted(
            entry.name
            for distribution in distributions()
            for entry in distribution.entry_points
            if entry.group.startswith("vllm.")
            and entry.group != _ENDPOINTS
            and entry.name not in _BY_NAME_ONLY
        )
    return ",".join(dict.fromkeys([*names, ENTRY_POINT]))


def activate() -> None:
    """Install what a chosen plugin needs in this process; may be called again."""
    engine_config.install(prepared_arguments, attach_features)
    engine_status.install(engine_state, tell_feature)
    if ENV_SELECTION not in os.environ:  # --xllm-config came before --plugins
        return
    selection = current_selection()
    for name, feature in registry().features().items():
        if name in selection and feature.install is not None:
            feature.install()


def active_features(vllm_config: Any) -> list[Feature]:
    """The features that are attached to a configuration."""
    report = vllm_config.additional_config.get(REPORT_KEY, {"features": []})
    active = {row["feature"] for row in report["features"] if row["active"]}
    return [feature for name, feature in registry().features().items() if name in active]


def section_of(feature: Feature, vllm_config: Any) -> Section:
    """The settings with which a feature is attached to a configuration.

    Secrets are read again, from where they were given to this process or its parent.
    """
    values = dict(vllm_config.additional_config[SETTINGS_KEY][feature.name])
    given = section_values(load_settings({}).sections[feature.name])
    values |= {key: value for key, value in given.items() if is_secret(feature.section, key)}
    section: Section = parse_section(feature.section, feature.name, values)
    return section


def engine_state(engine_core: Any) -> dict[str, Any]:
    """The state of every feature in an engine's process, in plain types."""
    found = status.engine_status()
    for feature in active_features(engine_core.vllm_config):
        if feature.report is not None:
            found[feature.name] = status.plain(feature.report(engine_core))
    return found


def tell_feature(engine_core: Any, name: str, command: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a feature that is active in an engine's process a command; its answer."""
    for feature in active_features(engine_core.vllm_config):
        if feature.name == name and feature.tell is not None:
            return dict(feature.tell(engine_core, command))
    return {"error": f"xllm.{name} is not active and takes no command."}


def load_settings(additional: Mapping[str, Any]) -> Settings:
    """The settings that the flags, the file, the environment and the defaults make together.

    Args:
        additional: what ``--additional-config`` has under ``xllm``.
    """
    sections = registry().sections()
    sources = [Source("--additional-config", additional)]
    text = os.environ.get(ENV_CONFIG)
    if text is not None:
        source = source_from_text(text)
        # Inline JSON is a flag and stronger than the other flag; a file comes after both.
        sources.insert(0 if text.lstrip().startswith("{") else 1, source)
    return resolve(sections, [*sources, source_from_environment(sections)])


def current_selection() -> Selection:
    """What ``XLLM_PLUGINS`` selects.

    Raises:
        ConfigError: it is unset, or wrong.
    """
    text = os.environ.get(ENV_SELECTION)
    if text is None:
        raise ConfigError("--xllm-config needs --plugins; allowed is --plugins xllm, for example.")
    return parse_selection(text, registry().features())


def prepared_arguments(engine_args: Any) -> dict[str, Any]:
    """What the selected features change in the user's arguments before vLLM builds on them.

    A feature that cannot work here changes nothing, and says why when it is attached.

    Raises:
        ConfigError: a setting cannot be used.
    """
    selection = current_selection()
    additional = engine_args.additional_config
    settings = load_settings(
        additional.get(SETTINGS_KEY, {}) if isinstance(additional, Mapping) else {}
    )
    changes: dict[str, Any] = {}
    for feature in registry().features().values():
        section = settings.sections[feature.name]
        if feature.prepare is None or standing_reason(feature, section, selection):
            continue
        if all(inspect_seam(seam).holds for seam in feature.seams):
            try:
                changes |= feature.prepare(engine_args, section)
            except NotAvailableError as error:
                logger.debug("xllm.%s changes no argument: %s", feature.name, error)
    return changes


def attach_features(engine_args: Any, vllm_config: Any) -> None:
    """Attach every selected feature to one configuration that vLLM has just built.

    The settings, but for secrets, and the decisions travel to every process inside
    ``additional_config``, which vLLM logs.

    Raises:
        ConfigError: a setting cannot be used.
        FeatureError: a feature with mode ``on`` cannot work here.
    """
    selection = current_selection()
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        raise FeatureError(
            f"--additional-config is a {type(additional).__name__}; the xLLM features need a "
            "mapping, because their settings travel in it."
        )
    settings = load_settings(additional.get(SETTINGS_KEY, {}))
    decisions = []
    for feature in registry().features().values():
        section = settings.sections[feature.name]
        attachment = Attachment(engine_args, vllm_config, section)
        decisions.append(decide(feature, section, selection, attachment))
    vllm_config.additional_config = {
        **additional,
        SETTINGS_KEY: settings.without_secrets(),
        REPORT_KEY: report(decisions, settings),
    }
    if multiprocessing.parent_process() is None:
        logger.info("xLLM features\n%s", table(decisions))


def decide(
    feature: Feature, section: Section, selection: Selection, attachment: Attachment
) -> Decision:
    """Attach one feature, or say why it is off.

    Raises:
        ConfigError: its settings name something that is not installed.
        FeatureError: its mode is ``on`` and it cannot work here.
    """
    reason = standing_reason(feature, section, selection)
    if reason:
        return Decision(feature.name, section.mode.value, False, reason)
    attached_to = ""
    try:
        feature.check(section)
        broken = [r for r in map(inspect_seam, feature.seams) if not r.holds]
        if broken:
            raise NotAvailableError(f"seam {broken[0].seam} does not hold: {broken[0].reason}")
        attached_to = feature.attach(attachment)
    except NotAvailableError as error:
        reason = str(error)
    except ConfigError:
        raise
    except Exception as error:
        reason = f"it failed to attach: {type(error).__name__}: {error}"
        logger.exception("xllm.%s %s", feature.name, reason)
    if reason and section.mode is Mode.ON:
        raise FeatureError(f"{feature.name}.mode is on, but it cannot work here: {reason}.")
    why = reason or ("asked for" if section.mode is Mode.ON else "its conditions hold")
    return Decision(feature.name, section.mode.value, not reason, why, attached_to)


def versions() -> dict[str, str | None]:
    """The versions of everything that the features stand on; None where it is not installed."""
    return {
        "xllm-plugins": distribution_version("xllm-plugins"),
        "vllm": vllm_version(),
        "vllm-ascend": distribution_version("vllm-ascend"),
        "torch": distribution_version("torch"),
    }


def report(decisions: Sequence[Decision], settings: Settings) -> dict[str, Any]:
    """Decisions, origins and versions as plain JSON types, for ``/xllm/v1/status``."""
    return {
        "features": as_report(decisions),
        "origins": dict(settings.origins),
        "versions": versions(),
    }
