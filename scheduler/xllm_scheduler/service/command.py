"""``xllm router``: the service's command line."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import typing
from typing import TYPE_CHECKING, Any

from xllm_plugins.config import (
    Group,
    Limits,
    Source,
    parse_section,
    resolve,
    source_from_environment,
    source_from_text,
)
from xllm_plugins.errors import ConfigError, NotAvailableError
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.config import RouterSection

if TYPE_CHECKING:
    from xllm_plugins.config import Settings

_SECTIONS: dict[str, type[Group]] = {"router": RouterSection, "scheduler": SchedulerSection}
_RESOLVED = "_XLLM_ROUTER"  # how worker processes get the settings


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``router``."""
    made = subparsers.add_parser(
        "router",
        help="one OpenAI endpoint over many instances",
        description="Routes to vLLM instances. Every option is also a setting of the section "
        "router in --config and an environment variable XLLM_ROUTER_NAME; classes and SLOs are "
        "read by the settings of the section scheduler.",
    )
    made.set_defaults(run=run)
    made.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    made.add_argument("--port", type=int, default=8080, help="default: %(default)s")
    made.add_argument("--workers", type=int, default=1, help="processes; default: %(default)s")
    made.add_argument("--config", help="a YAML or JSON file, or a JSON object")
    hints = typing.get_type_hints(RouterSection)
    for field in dataclasses.fields(RouterSection):
        limits: Limits = field.metadata["limits"]
        made.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=hints[field.name],
            help=f"{limits.doc}; default: {field.default!r}".replace("%", "%%"),
        )


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that options, file and environment make, in this order.

    Raises:
        ConfigError: one cannot be used; names it, its origin and what is allowed.
    """
    given = {
        field.name: value
        for field in dataclasses.fields(RouterSection)
        if (value := getattr(args, field.name)) is not None
    }
    sources = [Source("the command line", {"router": given})]
    if args.config:
        sources.append(source_from_text(args.config, "--config"))
    sources.append(source_from_environment(_SECTIONS, os.environ))
    return resolve(_SECTIONS, sources)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped; the exit status."""
    settings = settings_of(args)
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; allowed is a whole number at least 1.")
    _check_workers(args.workers, settings)
    try:
        import uvicorn

        import xllm_scheduler.service.app  # noqa: F401 - to say here what is missing
    except ModuleNotFoundError as error:
        raise NotAvailableError(
            f"xllm router needs {error.name}; pip install 'xllm-plugins[router]' brings it."
        ) from error
    values = settings.as_dict()
    values["router"]["address"] = values["router"]["address"] or f"http://{args.host}:{args.port}"
    os.environ[_RESOLVED] = json.dumps(values)
    uvicorn.run(
        "xllm_scheduler.service.command:application",
        factory=True,
        host=args.host,
        port=args.port,
        workers=args.workers,
        log_level="info",
        access_log=False,
    )
    return 0


def _check_workers(workers: int, settings: Settings) -> None:
    """Refuse several processes where one would not know what another one is told."""
    section = settings.sections["router"]
    assert isinstance(section, RouterSection)
    if workers == 1:
        return
    if section.data:
        raise ConfigError(
            f"--workers is {workers}; with router.data allowed is 1, since one process runs the "
            "batches of a folder."
        )
    if not (section.etcd or section.instances):
        raise ConfigError(
            f"--workers is {workers}; allowed is 1 without router.etcd and router.instances, since "
            "an instance that registers itself tells only one process."
        )


def application() -> Any:
    """The ASGI application, by the settings that :func:`run` left for its worker processes."""
    from xllm_scheduler.service.app import build

    values = json.loads(os.environ[_RESOLVED])
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("xllm").setLevel(logging.INFO)
    made = build(*(parse_section(cls, name, values[name]) for name, cls in _SECTIONS.items()))
    gc.collect()
    gc.freeze()  # what is there now stays, and need not be looked through ever again
    return made
