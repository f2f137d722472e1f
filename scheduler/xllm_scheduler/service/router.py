"""One router: what it knows of instances, its tasks and its connections."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from xllm_plugins.config import parse_section, section_values
from xllm_plugins.errors import ConfigError
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.batch import Batches
from xllm_scheduler.service.batch_store import BatchStore
from xllm_scheduler.service.config import RouterSection, roles_of, routing_of
from xllm_scheduler.service.etcd import Etcd
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.gateway import Gateway
from xllm_scheduler.service.kv_feed import KvFeed
from xllm_scheduler.service.kv_snapshot import snapshot_of
from xllm_scheduler.service.probes import Watch, asked
from xllm_scheduler.service.registry import Patience, Record
from xllm_scheduler.service.routing import InstanceView, Role, RoutingPolicy
from xllm_scheduler.service.seen import Seen
from xllm_scheduler.service.staged import Guarded
from xllm_scheduler.service.tokens import Tokens
from xllm_scheduler.service.turning import Turner, TurningError
from xllm_scheduler.service.upstream import Upstream

_ASK_AGAIN_S = 1.0
CHANGEABLE = (
    "routing", "roles", "ttft_ms", "tpot_ms", "role_margin", "role_patience", "role_cool_down_s",
    "roles_every_s",
)  # fmt: skip
logger = logging.getLogger("xllm.router")


class Service:
    """See the module.

    Args:
        section: its settings.
        classes: settings of class and SLOs.
    """

    def __init__(self, section: RouterSection, classes: SchedulerSection) -> None:
        self.section = section
        patience = Patience(suspect_s=section.suspect_s)
        most = section.offline_requests
        self.fleet = Fleet(_guarded(section), roles_of(section), most, patience=patience)
        self.seen = Seen()
        self._classes = classes
        self.batches: Batches | None = None
        if section.data:
            store = BatchStore(Path(section.data).expanduser())
            views = functools.partial(_views, self.fleet)
            self.batches = Batches(store, self._ask, views, most)
        self.etcd: Etcd | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect and begin to look after instances."""
        unlimited = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self.session = aiohttp.ClientSession(
            connector=unlimited, timeout=timeout, auto_decompress=False
        )
        self.tokens = Tokens(self.section.tokenizers, self.session, self._serving)
        if self.fleet.routing.reads_cached:
            self.tokens.prepare()
        self.upstream = Upstream()
        self.gateway = Gateway(
            self.fleet, self.section, self._classes, self.tokens, self.seen, self.upstream
        )
        self.turner = Turner(
            self.fleet, self.session, self.section.admin_token, self.section.instance_key
        )
        ask = functools.partial(snapshot_of, self.session, self.section.admin_token)
        self.feed = KvFeed(self.fleet, time.monotonic, ask)
        watch = Watch(
            self.fleet,
            self.session,
            time.monotonic,
            self.section.probe_s,
            self.gateway.lose,
            self._lost,
        )
        self._tasks = [asyncio.create_task(watch.run()), asyncio.create_task(self._change_roles())]
        if self.batches is not None:
            self._tasks.append(asyncio.create_task(self.batches.run()))
        if self.section.etcd:
            self._share(Etcd(self.session, self.section.etcd, self.section.etcd_prefix))
        for url in self._listed():
            self._tasks.append(asyncio.create_task(self._join_when_there(url)))

    async def stop(self) -> None:
        """End what was begun."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.feed.close()
        if self.etcd is not None:
            await self.etcd.close()
        if self.batches is not None:
            self.batches.store.close()
        self.tokens.close()
        self.upstream.close()
        await self.session.close()

    def join(self, record: Record) -> None:
        """An instance is there."""
        if self.fleet.join(record, time.monotonic()):
            logger.info("%s joins as %s", record.name, record.role.value)
            if self.fleet.routing.reads_cached:
                self.feed.follow(record)
        self.gateway.changed.set()

    def leave(self, name: str) -> None:
        """An instance is gone."""
        self.feed.leave(name)
        self.fleet.leave(name)
        self.gateway.lose(name)

    def _listed(self) -> list[str]:
        """The addresses that settings name."""
        parts = (part.strip().rstrip("/") for part in self.section.instances.split(","))
        return [part for part in parts if part]

    def _lost(self, name: str) -> None:
        """An instance has not answered for long. One that is listed may come again."""
        member = self.fleet.registry.members.get(name)
        url = member.record.url if member else f"http://{name}"
        self.leave(name)
        if url in self._listed():
            self._tasks.append(asyncio.create_task(self._join_when_there(url)))

    async def _ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        return await self.gateway.ask(path, body)

    async def _join_when_there(self, url: str) -> None:
        while True:
            record = await asked(self.session, url)
            if record is not None:
                self.join(record)
                return
            await asyncio.sleep(_ASK_AGAIN_S)

    def _serving(self, model: str) -> Record | None:
        for member in self.fleet.registry.members.values():
            record = member.record
            if member.accepts and record.models and (not model or model in record.models):
                return record
        return None

    async def _change_roles(self) -> None:
        while True:
            await asyncio.sleep(self.section.roles_every_s)
            if self.etcd is not None and not self.etcd.leads:
                continue
            try:
                wanted = self.fleet.wanted_roles(time.monotonic())
            except Exception:
                logger.exception("the policy %s failed; roles stay", self.section.roles)
                continue
            for name, role in wanted.items():
                try:
                    await self.change_role(name, role)
                except (TurningError, KeyError) as error:
                    logger.warning("%s does not become %s: %s", name, role.value, error)
                    self.fleet.cannot_transfer(name)

    async def change_role(self, name: str, role: Role) -> None:
        """Give an instance another role, at every router.

        Raises:
            KeyError: there is none of that name.
            TurningError: it could not be; says why.
        """
        await self.turner.turn(name, role)
        self._set_role(name, role)
        await self._shared(f"roles/{name}", {"role": role.value})

    async def drain(self, name: str, drains: bool) -> None:
        """Give an instance nothing new, or again; at every router."""
        self.fleet.drain(name, drains)
        self.gateway.changed.set()
        await self._shared(f"drains/{name}", {"drains": drains})

    def change_policies(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Route and change roles by other settings from now on; all settings.

        Raises:
            ConfigError: one is not known, has a bad value, or is fixed at the start.
        """
        for name in values:
            if name not in CHANGEABLE:
                raise ConfigError(
                    f"router.{name} does not change at run time; allowed are "
                    f"{', '.join(CHANGEABLE)}."
                )
        merged = {**section_values(self.section), **values}
        section: RouterSection = parse_section(RouterSection, "router", merged)
        routing, roles = _guarded(section), roles_of(section)
        if routing.reads_cached and not self.fleet.routing.reads_cached:
            self.tokens.prepare()
            for member in self.fleet.registry.members.values():
                self.feed.follow(member.record)
        self.section, self.fleet.routing, self.fleet.roles = section, routing, roles
        return {name: section_values(section)[name] for name in CHANGEABLE}

    def _set_role(self, name: str, role: Role) -> None:
        member = self.fleet.registry.members.get(name)
        if member is not None and member.role is not role:
            self.fleet.set_role(name, role, time.monotonic())
            logger.info("%s is %s now", name, role.value)

    # What routers share through etcd

    def _share(self, etcd: Etcd) -> None:
        self.etcd = etcd
        address = self.section.address
        etcd.keep(f"routers/{address.partition('://')[2]}", {"url": address})
        watched = {
            "instances/": self._instance_changed,
            "roles/": self._role_changed,
            "drains/": self._drain_changed,
        }
        self._tasks.append(asyncio.create_task(etcd.run(lead_as=address)))
        for prefix, changed in watched.items():
            self._tasks.append(asyncio.create_task(etcd.watch(prefix, changed)))

    async def _shared(self, key: str, value: Mapping[str, Any]) -> None:
        if self.etcd is None:
            return
        try:
            await self.etcd.put(key, value)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            logger.warning("etcd does not take %s: %s; other routers do not know", key, error)

    def _instance_changed(self, name: str, value: Mapping[str, Any] | None) -> None:
        member = self.fleet.registry.members.get(name)
        if value is not None:
            try:
                self.join(Record.parsed(value))
            except (ConfigError, TypeError) as error:
                logger.warning("etcd has an instance that cannot be: %s", error)
        elif member is not None:
            # Its lease has run out. It is probed from now on, and serves while it answers.
            self.fleet.registry.lease_lost(name, member.record.incarnation, time.monotonic())

    def _role_changed(self, name: str, value: Mapping[str, Any] | None) -> None:
        if value is not None and value.get("role") in [role.value for role in Role]:
            self._set_role(name, Role(value["role"]))

    def _drain_changed(self, name: str, value: Mapping[str, Any] | None) -> None:
        if value is not None and name in self.fleet.registry.members:
            self.fleet.drain(name, bool(value.get("drains")))
            self.gateway.changed.set()


def _guarded(section: RouterSection) -> RoutingPolicy:
    def failed(error: Exception) -> None:
        logger.error("the policy %s failed", section.routing, exc_info=error)

    return Guarded(routing_of(section), failed)


def _views(fleet: Fleet) -> list[InstanceView]:
    return fleet.views(time.monotonic())
