"""The compose file, as Docker reads it."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.deploy.chart import DEPLOY

PATH = DEPLOY / "compose.yaml"
GIVEN = {"XLLM_TOKEN": "secret"}


def _interpolated(text: str) -> str:
    """As Docker does it, with nothing but what has to be given."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        return rest if kind == ":-" else GIVEN[name]

    return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)


SERVICES: dict[str, Any] = yaml.safe_load(_interpolated(PATH.read_text()))["services"]
INSTANCES = {name: one for name, one in SERVICES.items() if name.startswith("instance-")}
