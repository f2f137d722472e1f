"""One typed, frozen settings tree: a section per feature, every value with its origin.

A section is a frozen dataclass that extends :class:`Section`, or :class:`Group` where it is not a
feature's; its fields are made with :func:`option`. Values come from several sources and the
strongest wins, key by key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from xllm_plugins.errors import ConfigError
from xllm_plugins.names import ENV_CONFIG, ENV_SELECTION

ENV_PREFIX = "XLLM_"
DEFAULT_ORIGIN = "default"


class Mode(str, Enum):
    """Whether a feature is on: where it can help, always, or never."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class Limits:
    """What a value may be, beside its type; a secret is shown to nobody."""

    doc: str
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    secret: bool = False


def option(
    default: Any,
    doc: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    secret: bool = False,
) -> Any:
    """A field of a section: its default, one line of documentation and its bounds.

    Its type is an enum, a number, a text, a boolean, or ``Mapping[str, Literal[...]]``.
    """
    limits = Limits(doc, above, at_least, at_most, secret)
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"limits": limits})
    return dataclasses.field(default=default, metadata={"limits": limits})


@dataclass(frozen=True)
class Group:
    """Settings that stand together."""


@dataclass(frozen=True)
class Section(Group):
    """The settings of one feature. Every section has a mode."""

    mode: Mode = option(Mode.AUTO, "on where it can help, always on, or off")


@dataclass(frozen=True)
class Source:
    """Values from one place. ``values`` maps section to key to value."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """The resolved tree: ``sections`` by name, and the origin of each ``section.key``."""

    sections: Mapping[str, Any]
    origins: Mapping[str, str]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The values as plain JSON types, section by section."""
        return {name: section_values(section) for name, section in self.sections.items()}

    def without_secrets(self) -> dict[str, dict[str, Any]]:
        """The same for places that people look at, secrets left at their defaults."""
        return {
            name: {
                key: value
                for key, value in section_values(section).items()
                if not is_secret(type(section), key)
            }
            for name, section in self.sections.items()
        }


def section_values(section: Group) -> dict[str, Any]:
    """One section's values as plain JSON types."""
    values = dataclasses.asdict(section)
    return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}


def is_secret(cls: type[Group], key: str) -> bool:
    """Whether a setting is to be shown to nobody."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    limits: Limits = fields[key].metadata["limits"]
    return limits.secret


def resolve(sections: Mapping[str, type[Group]], sources: Sequence[Source]) -> Settings:
    """Merge sources, strongest first, into one validated tree.

    Raises:
        ConfigError: an unknown section or key, a wrong type, or a value out of bounds, in one
            sentence with the path, its origin, the value and what is allowed.
    """
    chosen: dict[str, dict[str, Any]] = {name: {} for name in sections}
    origins = {
        f"{name}.{field.name}": DEFAULT_ORIGIN
        for name, cls in sections.items()
        for field in dataclasses.fields(cls)
    }
    for source in reversed(sources):
        if not isinstance(source.values, Mapping):
            raise ConfigError(
                f"{source.origin} holds {source.values!r}; allowed is a mapping of sections."
            )
        for name, values in source.values.items():
            if name not in sections:
                raise ConfigError(_unknown(str(name), source.origin, sorted(sections), "section"))
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"{name} from {source.origin} is {values!r}; allowed is a mapping of settings."
                )
            for key, value in values.items():
                path = f"{name}.{key}"
                chosen[name][key] = _checked(sections[name], path, value, source.origin)
                origins[path] = source.origin
    built = {name: cls(**chosen[name]) for name, cls in sections.items()}
    return Settings(sections=built, origins=origins)


def parse_section(cls: type[Group], name: str, values: Mapping[str, Any]) -> Any:
    """Build one section from plain values, as they arrive in another process."""
    return resolve({name: cls}, [Source("the engine's configuration", {name: values})]).sections[
        name
    ]


def source_from_text(text: str, flag: str = "--xllm-config") -> Source:
    """Read ``--xllm-config``: a JSON object given inline, or the path of a YAML or JSON file."""
    if text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{flag} is not valid JSON: {error}.") from error
        return Source(flag, values)
    path = Path(text).expanduser()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{flag} is {text!r}, which cannot be read ({error.strerror}); "
            "allowed is a YAML or JSON file, or a JSON object."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # PyYAML's errors have several lines.
        why = " ".join(str(error).split())
        raise ConfigError(f"{flag} file {text} is not valid YAML: {why}.") from error
    return Source(f"file {text}", values)


def source_from_environment(
    sections: Mapping[str, type[Group]], environ: Mapping[str, str] = os.environ
) -> Source:
    """Read ``XLLM_<SECTION>_<KEY>`` variables; ``XLLM_SCHEDULER_TPOT_MS=100`` for example."""
    values: dict[str, dict[str, Any]] = {}
    for variable, text in sorted(environ.items()):
        if variable in (ENV_SELECTION, ENV_CONFIG):
            continue
        for name, section in sections.items():
            prefix = f"{ENV_PREFIX}{name.upper()}_"
            if variable.startswith(prefix):
                key = variable[len(prefix) :].lower()
                is_text = typing.get_type_hints(section).get(key) is str
                values.setdefault(name, {})[key] = text if is_text else _scalar(text)
    return Source("environment", values)


def _scalar(text: str) -> Any:
    """A number, true or false where the text is one, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _checked(cls: type[Group], path: str, value: Any, origin: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    section, key = path.split(".", 1)
    if key not in fields:
        known = [f"{section}.{name}" for name in fields]
        raise ConfigError(_unknown(path, origin, known, "setting"))
    kind = typing.get_type_hints(cls)[key]
    limits: Limits = fields[key].metadata["limits"]
    if names := _mapped_to(kind):
        if isinstance(value, Mapping) and all(
            isinstance(name, str) and wanted in names for name, wanted in value.items()
        ):
            return dict(value)
    elif issubclass(kind, Enum):
        # YAML 1.1 reads an unquoted on or off as a boolean.
        wanted = {True: "on", False: "off"}.get(value, value) if type(value) is bool else value
        if wanted in [member.value for member in kind]:
            return kind(wanted)
    elif kind in (int, float):
        # By type and not isinstance: a boolean is no number.
        if type(value) in (int, kind) and _within(value, limits):
            return kind(value)
    elif type(value) is kind:
        return value
    raise ConfigError(f"{path} from {origin} is {value!r}; allowed is {allowed(kind, limits)}.")


def _within(value: float, limits: Limits) -> bool:
    return (
        math.isfinite(value)
        and (limits.above is None or value > limits.above)
        and (limits.at_least is None or value >= limits.at_least)
        and (limits.at_most is None or value <= limits.at_most)
    )


def _mapped_to(kind: Any) -> tuple[str, ...]:
    """The values that a ``Mapping[str, Literal[...]]`` may have; none for any other type."""
    return typing.get_args(typing.get_args(kind)[1]) if typing.get_args(kind) else ()


def allowed(kind: type, limits: Limits) -> str:
    """What a setting accepts, in words."""
    if names := _mapped_to(kind):
        return f"a mapping of names to {' or '.join(names)}"
    if issubclass(kind, Enum):
        return ", ".join(member.value for member in kind)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (
            ("above", limits.above),
            ("at least", limits.at_least),
            ("at most", limits.at_most),
        )
        if bound is not None
    ]
    return " ".join([words, " and ".join(bounds)]).strip()


def _unknown(path: str, origin: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
    hint = f"the nearest is {near[0]}" if near else "there are none"
    return f"{path} from {origin} is not a {what}; {hint}."
