"""``xllm kv top``: the KV tiers of a server, or of all servers behind a router, as they are now."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xllm_kv.top import HEADINGS, Server, instances, rows
from xllm_plugins.errors import ConfigError, NotAvailableError

if TYPE_CHECKING:
    from rich.table import Table

_ANSWER_S = 5.0
_TEXTS = 2  # columns; the others are numbers


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xllm kv top``."""
    made = subparsers.add_parser("kv", help="KV tiers of servers")
    actions = made.add_subparsers(title="actions", required=True, metavar="ACTION")
    top = actions.add_parser("top", help="show sizes, hits, speeds and errors, in place")
    top.add_argument("url", help="of a server or a router, http://127.0.0.1:8000 for example")
    top.add_argument("--once", action="store_true", help="print once")
    top.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds (%(default)s)")
    top.set_defaults(run=_top)


def _top(args: argparse.Namespace) -> int:
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(
            f"The server is {args.url!r}; allowed is an address with http:// or https://."
        )
    if args.every <= 0.0:
        raise ConfigError(f"--every is {args.every:g}; allowed is a number above 0.")
    if importlib.util.find_spec("rich") is None:
        raise NotAvailableError("xllm kv top needs rich: pip install 'xllm-plugins[router]'.")
    from rich.console import Console
    from rich.live import Live

    servers = _servers(args.url)
    if servers and all(one.status is None and one.metrics is None for one in servers):
        raise NotAvailableError(f"{args.url} gives neither /xllm/v1/status nor /metrics.")
    if args.once:
        Console().print(_table(servers))
        return 0
    return _live(Live(_table(servers)), lambda: _table(_servers(args.url)), args.every)


def _live(live: Any, look: Callable[[], Table], every_s: float) -> int:
    with live:
        try:
            while True:
                time.sleep(every_s)
                live.update(look(), refresh=True)
        except KeyboardInterrupt:
            return 0


def _table(servers: list[Server]) -> Table:
    from rich.table import Table

    made = Table(box=None)
    for number, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="left" if number < _TEXTS else "right")
    for row in rows(servers):
        made.add_row(*row)
    return made


def _servers(url: str) -> list[Server]:
    """The server at an address, or all behind it."""
    base = url.rstrip("/")
    status = _status(base)
    behind = instances(status or {})
    if behind is None:
        return [Server(base.partition("://")[2], status, _fetched(f"{base}/metrics"))]
    return [Server(name, _status(at), _fetched(f"{at}/metrics")) for name, at in behind]


def _status(base: str) -> dict[str, Any] | None:
    text = _fetched(f"{base}/xllm/v1/status")
    try:
        found = None if text is None else json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _fetched(address: str) -> str | None:
    try:
        with urllib.request.urlopen(address, timeout=_ANSWER_S) as answer:  # noqa: S310 - http
            text: str = answer.read().decode()
            return text
    except (OSError, urllib.error.HTTPError, ValueError):
        return None
