"""Whether command lines and variables of deployments are ones that vLLM and the router take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tests.contract.children import run_child
from xllm_plugins.cli import parser
from xllm_plugins.config import resolve, source_from_environment
from xllm_plugins.manager import registry
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.command import settings_of
from xllm_scheduler.service.config import RouterSection

# `vllm serve` with each of the command lines; of those that are refused the reason.
_PARSE = """
import json, sys
from tests.contract.children import forked
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

top = FlexibleArgumentParser()
commands = top.add_subparsers(dest="subparser")
for command in cmd_init():
    command.subparser_init(commands)
lines = json.loads(sys.argv[1])
ends = [forked(lambda line=line: str(top.parse_args(["serve", *line]).model_tag)) for line in lines]
print(json.dumps([[end["result"], end["error"] or end["stderr"][-500:]] for end in ends]))
"""


def serve_refusals(lines: Sequence[Sequence[str]]) -> list[str]:
    """What ``vllm serve`` with our options refuses of command lines that begin with a model.

    Raises:
        AssertionError: the child that parses them failed.
    """
    found = run_child(_PARSE, json.dumps(lines), env={"VLLM_LOGGING_LEVEL": "ERROR"})
    pairs = zip(lines, found, strict=True)
    return [f"{line}: {why}" for line, (model, why) in pairs if model != line[0]]


def check_router(line: Sequence[str], environment: Mapping[str, str]) -> None:
    """Takes a command line of ``xllm router`` as it does itself.

    Raises:
        SystemExit: an option is not known.
        ConfigError: a setting is not known, or has a value that is not allowed.
    """
    settings_of(parser().parse_args(["router", *line]))
    sections = {"router": RouterSection, "scheduler": SchedulerSection}
    resolve(sections, [source_from_environment(sections, environment)])


def check_instance(environment: Mapping[str, str]) -> None:
    """Takes an instance's settings from its environment.

    Raises:
        ConfigError: a setting is not known, or has a value that is not allowed.
    """
    sections = registry().sections()
    resolve(sections, [source_from_environment(sections, environment)])


def unknown_to_vllm(environment: Mapping[str, str]) -> set[str]:
    """Of an instance's variables those that begin with ``VLLM_`` and that vLLM does not read."""
    from vllm.envs import environment_variables

    return {name for name in environment if name.startswith("VLLM_")} - {*environment_variables}
