"""The other end: an instance that registers itself with routers and tells them how busy it is.

Runs in an API server of ``vllm serve --plugins xllm`` where the section ``service`` names routers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xllm_plugins.compat import inspect_seam
from xllm_plugins.config import Section, option
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.routing import Role
from xllm_scheduler.service.waiting import kept_up

if TYPE_CHECKING:
    from xllm_scheduler.service.etcd import Etcd

ROLE_PATH, KV_PATH = "/xllm/v1/role", "/xllm/v1/kv"
_PORT_ENV = "_XLLM_KV_EVENTS_PORT"  # one choice for all processes of an instance
# The engine takes its ports only after it has loaded the model. Until then one of those that
# systems give to outgoing connections would often be gone.
_PORTS = range(20_000, 32_000)
_AGAIN_S = 2.0
_KEEPERS = frozenset({"OffloadingConnector", "SimpleCPUOffloadConnector", "TiersConnector"})
logger = logging.getLogger("vllm.xllm_scheduler")


@dataclass(frozen=True)
class ServiceSection(Section):
    """The ``service`` section of an instance."""

    routers: str = option("", "addresses of routers to register with, separated by commas")
    etcd: str = option("", "etcd's address, to register there and to find the routers")
    etcd_prefix: str = option("/xllm", "what all keys in etcd begin with")
    token: str = option("", "the routers' admin token", secret=True)
    address: str = option("", "where routers reach this server; empty for its own host and port")
    role: Role = option(Role.MIXED, "what it begins as")
    beat_s: float = option(0.25, "how often it reports its load, s", above=0.0)


def check(section: ServiceSection) -> None:
    """Stand back where there is no router.

    Raises:
        NotAvailableError: none is named.
    """
    if not (section.routers or section.etcd):
        raise NotAvailableError("service.routers and service.etcd name nobody to register with")


def attach(attachment: Attachment) -> str:
    """Have the engine tell of its KV, unless the user has settled that."""
    section = attachment.section
    assert isinstance(section, ServiceSection)
    config = attachment.vllm_config
    if config.cache_config.enable_prefix_caching and config.kv_events_config is None:
        config.kv_events_config = _kv_events(config.parallel_config.data_parallel_size)
    return section.routers or section.etcd


def _kv_events(ranks: int) -> Any:
    from vllm.config import KVEventsConfig

    if _PORT_ENV not in os.environ:
        os.environ[_PORT_ENV] = str(_free_ports(2 * ranks))
    port = int(os.environ[_PORT_ENV])
    return KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=f"tcp://*:{port}",
        replay_endpoint=f"tcp://*:{port + ranks}",
    )


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has now."""
    while True:
        port = _PORTS.start + secrets.randbelow(len(_PORTS) - count)
        with contextlib.ExitStack() as stack:
            try:
                for offset in range(count):
                    stack.enter_context(socket.socket()).bind(("", port + offset))
            except OSError:
                continue
        return port


def record_of(config: Any, args: Any, section: ServiceSection, engine: Mapping[str, Any]) -> Record:
    """What the instance says of itself.

    Args:
        config: vLLM's configuration.
        args: the server's arguments.
        section: its settings.
        engine: what the engine reports of the scheduler and its cache.
    """
    url = (section.address or f"http://{args.host or _own_address()}:{args.port}").rstrip("/")
    names = config.model_config.served_model_name
    models = [names] if isinstance(names, str) else list(names)
    loras = [module.name for module in getattr(args, "lora_modules", None) or ()]
    ranks = config.parallel_config.data_parallel_size
    events, replay = _publishers(config.kv_events_config, url, ranks)
    step_time = engine.get("step_time", {})
    settings = config.additional_config.get("xllm", {}).get("scheduler", {})
    return Record(
        name=url.partition("://")[2],
        url=url,
        models=[*models, *loras],
        loras=loras,
        tokenizer=str(config.model_config.tokenizer),
        role=section.role,
        incarnation=uuid.uuid4().hex,
        dp_size=ranks,
        max_model_len=config.model_config.max_model_len,
        block_tokens=engine.get("block_tokens", 0) if events else 0,
        full_groups=engine.get("full_groups", (0,)),
        kv_events=events,
        kv_replay=replay,
        kv_tokens=engine.get("kv_tokens", 0),
        step_tokens=config.scheduler_config.max_num_batched_tokens,
        step_time=step_time,
        pace_ms=float(settings.get("tpot_ms", 0.0)) if step_time else 0.0,
        transfers=inspect_seam("kv_both").holds and _transfers(config.kv_transfer_config),
    )


def _transfers(transfer: Any) -> bool:
    """Whether KV can go both ways, so that any role can be had."""
    if transfer is None or transfer.kv_role != "kv_both":
        return False
    children = transfer.kv_connector_extra_config.get("connectors", ())
    names = {child["kv_connector"] for child in children} or {transfer.kv_connector}
    return not names <= _KEEPERS


def _publishers(events: Any, url: str, ranks: int) -> tuple[Sequence[str], Sequence[str]]:
    """Where KV events are published, as others reach them; for each rank."""
    if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
        return (), ()
    host = url.partition("://")[2].rpartition(":")[0]

    def addresses(endpoint: str | None) -> list[str]:
        if not endpoint or not endpoint.startswith("tcp://"):
            return []
        base, _, port = endpoint.replace("*", host).rpartition(":")
        return [f"{base}:{int(port) + rank}" for rank in range(ranks)]

    return addresses(events.endpoint), addresses(events.replay_endpoint)


def _own_address() -> str:
    return socket.gethostbyname(socket.gethostname())


class Registration:
    """Registers with every router, and again with one that has forgotten.

    Args:
        engine_client: vLLM's.
        args: the server's arguments.
        section: its settings.
    """

    def __init__(self, engine_client: Any, args: Any, section: ServiceSection) -> None:
        self._engine_client, self._args, self._section = engine_client, args, section
        self._routers: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Register and report, until cancelled."""
        import aiohttp

        from xllm_scheduler.service.etcd import Etcd

        section = self._section
        headers = {"authorization": f"Bearer {section.token}"}
        timeout = aiohttp.ClientTimeout(total=5.0)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            config = self._engine_client.vllm_config
            record = record_of(config, self._args, section, await self._engine())
            for router in filter(None, (part.strip() for part in section.routers.split(","))):
                self._follow(session, record, router)
            if not section.etcd:
                await asyncio.Event().wait()
            async with aiohttp.ClientSession() as plain:
                await self._shared(Etcd(plain, section.etcd, section.etcd_prefix), session, record)

    async def _shared(self, etcd: Etcd, session: Any, record: Record) -> None:
        """Register in etcd and report to all routers that are there."""

        def changed(name: str, value: Mapping[str, Any] | None) -> None:
            url = f"http://{name}" if value is None else str(value["url"])
            if value is not None:
                self._follow(session, record, url)
            elif url in self._routers:
                self._routers.pop(url).cancel()

        etcd.keep(f"instances/{record.name}", record.document())
        try:
            await asyncio.gather(etcd.run(), etcd.watch("routers/", changed))
        finally:
            await etcd.close()

    def _follow(self, session: Any, record: Record, router: str) -> None:
        router = router.rstrip("/")
        if router not in self._routers:
            keep = functools.partial(self._kept, session, router, record)
            self._routers[router] = asyncio.create_task(kept_up(f"reporting to {router}", keep))

    async def _kept(self, session: Any, router: str, record: Record) -> None:
        """One router's knowledge of this instance."""
        import aiohttp

        known = warned = False
        base = f"{router}/xllm/v1/instances"
        while True:
            try:
                engine = await self._engine()
                step_time = engine.get("step_time", {})
                if not known:
                    document = {**record.document(), "step_time": step_time}
                    async with session.post(base, json=document) as answer:
                        answer.raise_for_status()
                    logger.info("registered with the router %s", router)
                    warned = False
                beat = {
                    **engine.get("load", {}),
                    "step_time": step_time,
                    "incarnation": record.incarnation,
                }
                async with session.post(f"{base}/{record.name}/beat", json=beat) as answer:
                    known = answer.status == 200 and (await answer.json())["known"]
                await asyncio.sleep(self._section.beat_s)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                if not warned:
                    logger.warning("the router %s does not take reports: %s", router, error)
                known, warned = False, True
                await asyncio.sleep(_AGAIN_S)

    async def _engine(self) -> dict[str, Any]:
        """What the engines report, loads of several ranks added up."""
        from xllm_plugins.compat import engine_status

        reports = [
            one.get("service", {}).get("facts", {})
            for one in await engine_status.ask_engines(self._engine_client)
        ]
        if not reports:
            return {}
        made = dict(reports[0])
        loads = [report["load"] for report in reports if "load" in report]
        if loads:
            made["load"] = {name: sum(load[name] for load in loads) for name in loads[0]}
            made["load"]["kv_used"] /= len(loads)
        made["kv_tokens"] = sum(report.get("kv_tokens", 0) for report in reports)
        return made
