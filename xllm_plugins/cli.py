"""The ``xllm`` command. Its subcommands come from the plugins by hook; ``doctor`` is ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xllm_plugins import __version__, doctor
from xllm_plugins.errors import XllmError
from xllm_plugins.manager import registry


def parser() -> argparse.ArgumentParser:
    """The command line with every installed plugin's subcommands."""
    made = argparse.ArgumentParser(prog="xllm", description="xLLM's serving techniques for vLLM.")
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    doctor.add_command(subparsers)
    registry().hooks.hook.xllm_commands(subparsers=subparsers)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit status, 2 for input that cannot be used."""
    args = parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except XllmError as error:
        print(f"xllm: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
