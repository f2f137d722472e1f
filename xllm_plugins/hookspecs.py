"""Every hook that a plugin may implement: this page is the whole contract."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import pluggy

from xllm_plugins.features import Feature, Policy

NAMESPACE = "xllm_plugins"
hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def xllm_features() -> Iterable[Feature]:  # type: ignore[empty-body]
    """Features that this plugin brings; each is selected as ``xllm.NAME``."""


@hookspec
def xllm_policies() -> Iterable[Policy]:  # type: ignore[empty-body]
    """Policies that settings of a feature may choose by name."""


@hookspec
def xllm_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add subcommands to ``xllm``; set ``run`` with ``set_defaults``, a function args to status."""
