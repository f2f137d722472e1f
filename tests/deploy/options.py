"""Whether command lines and variables of deployments are ones that vLLM and the router take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.contract.children import run_child
from xllm_plugins.cli import parser
from xllm_plugins.config import resolve, source_from_environment
from xllm_plugins.manager import registry
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.command import settings_of
from xllm_scheduler.service.config import RouterSection

# The models that `vllm serve` reads from command lines, or why it does not; and vLLM's variables.
_PARSE = """
import json, sys
from tests.contract.children import forked
from vllm.entrypoints.cli.serve import cmd_init
from vllm.envs import environment_variables
from vllm.utils.argparse_utils import FlexibleArgumentParser

top = FlexibleArgumentParser()
commands = top.add_subparsers(dest="subparser")
for command in cmd_init():
    command.subparser_init(commands)
lines = json.loads(sys.argv[1])
ends = [forked(lambda line=line: str(top.parse_args(["serve", *line]).model_tag)) for line in lines]
read = [end["result"] or end["error"] or end["stderr"][-500:] for end in ends]
print(json.dumps({"read": read, "variables": list(environment_variables)}))
"""


class Instance(NamedTuple):
    """How a deployment starts one."""

    line: Sequence[str]
    """What follows ``vllm serve``; the model is the first."""
    environment: Mapping[str, str]


def refused(instances: Sequence[Instance]) -> list[str]:
    """What ``vllm serve`` with our options does not take of some instances' options and variables.

    Raises:
        ConfigError: a variable is not a setting of ours, or has a value that is not allowed.
        AssertionError: the child that parses them failed.
    """
    sections = registry().sections()
    for one in instances:
        resolve(sections, [source_from_environment(sections, one.environment)])
    found = run_child(_PARSE, json.dumps([list(one.line) for one in instances]))
    names = {name for one in instances for name in one.environment if name.startswith("VLLM_")}
    lines = [
        f"{one.line}: {read}"
        for one, read in zip(instances, found["read"], strict=True)
        if read != one.line[0]
    ]
    return [*lines, *sorted(names - {*found["variables"]})]


def check_router(line: Sequence[str], environment: Mapping[str, str]) -> None:
    """Takes a command line of ``xllm router`` as it does itself.

    Raises:
        SystemExit: an option is not known.
        ConfigError: a setting is not known, or has a value that is not allowed.
    """
    settings_of(parser().parse_args(["router", *line]))
    sections = {"router": RouterSection, "scheduler": SchedulerSection}
    resolve(sections, [source_from_environment(sections, environment)])
