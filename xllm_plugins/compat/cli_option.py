"""Seam: offer ``--plugins`` and ``--xllm-config`` on vLLM's command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported
from xllm_plugins.errors import XllmError

WHY = "vLLM has no option to choose plugins, and no hook to add an option."
WITHOUT = "XLLM_PLUGINS and XLLM_CONFIG choose instead of the options."
HOLDS_FOR = ">=0.23,<0.33"
SEAM = (
    Target("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",)),
    Target("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args", ("parser", "async_args_only")),
)


class _Option(argparse.Action):
    """An option that hands its text on as soon as it is parsed, and turns our errors into usage."""

    def __init__(self, *args: Any, chosen: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._chosen = chosen

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        try:
            self._chosen(str(values))
        except XllmError as error:
            parser.error(str(error))


def install(on_plugins: Callable[[str], None], on_config: Callable[[str], None]) -> None:
    """Add the two options; each calls its function with the text that the user gave."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def add_cli_args(parser: Any) -> Any:
            parser = original(parser)
            group = parser.add_argument_group(title="xLLM", description="xLLM plugins.")
            group.add_argument(
                "--plugins",
                action=_Option,
                chosen=on_plugins,
                metavar="xllm[.FEATURE][,-xllm.FEATURE]",
                help="Switch on xLLM's features: all of them with 'xllm', one with 'xllm.NAME', "
                "all but one with 'xllm,-xllm.NAME'.",
            )
            group.add_argument(
                "--xllm-config",
                action=_Option,
                chosen=on_config,
                metavar="FILE|JSON",
                help="Settings of the xLLM features: a YAML or JSON file, or a JSON object.",
            )
            return parser

        return add_cli_args

    def wrap(module: ModuleType) -> None:
        patch(module.EngineArgs, "add_cli_args", make, "cli_option")

    when_imported("vllm.engine.arg_utils", wrap)
