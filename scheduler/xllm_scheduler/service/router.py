"""One router: what it knows of instances, its tasks and its connections."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
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
from xllm_scheduler.service.told import EXPERT_LOADS, KV_TIERS, Told
from xllm_scheduler.service.turning import Turner, TurningError
from xllm_scheduler.service.upstream import Upstream
from xllm_scheduler.service.waiting import kept_up

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
        # What etcd says of instances, by name; they may join later.
        self._roles: dict[str, Mapping[str, Any]] = {}
        self._drains: dict[str, Mapping[str, Any]] = {}
        self._removed: dict[str, str] = {}  # incarnations
        self._shared_settings: dict[str, Any] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect and begin to look after instances."""
        unlimited = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self.session = aiohttp.ClientSession(
            connector=unlimited, timeout=timeout, auto_decompress=False, headers=self._key()
        )
        self.tokens = Tokens(self.section.tokenizers, self.session, self._serving)
        if self.fleet.routing.reads_cached:
            self.tokens.prepare()
        self.upstream = Upstream()
        self.gateway = Gateway(
            self.fleet, self.section, self._classes, self.tokens, self.seen, self.upstream
        )
        self.turner = Turner(self.fleet, self.session, self.section.admin_token)
        ask = functools.partial(snapshot_of, self.session, self.section.admin_token)
        self.feed = KvFeed(self.fleet, time.monotonic, ask)
        told = functools.partial(Told, self.fleet, self.session, time.monotonic)
        self.experts, self.tiers = told(EXPERT_LOADS), told(KV_TIERS)
        watch = Watch(
            self.fleet,
            self.session,
            time.monotonic,
            self.section.probe_s,
            self.gateway.lose,
            self._lost,
        )
        self._begin("looking after instances", watch.run)
        self._begin("changing roles", self._change_roles)
        if self.batches is not None:
            self._begin("running batches", self.batches.run)
        if self.section.etcd:
            self._plain = aiohttp.ClientSession(timeout=timeout)  # etcd gets no instance's key
            self._share(Etcd(self._plain, self.section.etcd, self.section.etcd_prefix))
        for url in self._listed():
            self._join_later(url)

    async def stop(self) -> None:
        """End what was begun."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.feed.close()
        if self.etcd is not None:
            await self.etcd.close()
            await self._plain.close()
        if self.batches is not None:
            self.batches.store.close()
        self.tokens.close()
        self.upstream.close()
        await self.session.close()

    def _key(self) -> dict[str, str]:
        key = self.section.instance_key
        return {"authorization": f"Bearer {key}"} if key else {}

    def _begin(self, what: str, begin: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.append(asyncio.create_task(kept_up(what, begin), name=what))

    def was_removed(self, record: Record) -> bool:
        """Whether an administrator has taken just this one away."""
        return self._removed.get(record.name, "") == record.incarnation != ""

    async def admit(self, record: Record) -> None:
        """An instance is there; by what an administrator says, also one that was removed."""
        if self._removed.pop(record.name, None) is not None:
            await self._shared(f"removed/{record.name}", {"incarnation": ""})
        self.join(record)

    async def remove(self, name: str) -> None:
        """Take an instance away, at every router, until it is started again or admitted."""
        incarnation = self.fleet.registry.members[name].record.incarnation
        self._removed[name] = incarnation
        self.leave(name)
        await self._shared(f"removed/{name}", {"incarnation": incarnation})

    def join(self, record: Record) -> None:
        """An instance is there, unless it was removed."""
        if self.was_removed(record):
            return
        if self.fleet.join(record, time.monotonic()):
            logger.info("%s joins as %s", record.name, record.role.value)
            for told, changed in ((self._roles, self._role_changed),
                                  (self._drains, self._drain_changed)):  # fmt: skip
                if record.name in told:
                    changed(record.name, told[record.name])
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
            self._join_later(url)

    async def _ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        return await self.gateway.ask(path, body)

    def _join_later(self, url: str) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        self._begin(f"joining {url}", functools.partial(self._join_when_there, url))

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
                    self.fleet.cannot_transfer(name, time.monotonic())

    async def change_role(self, name: str, role: Role) -> None:
        """Give an instance another role, at every router.

        Raises:
            KeyError: there is none of that name.
            TurningError: it could not be; says why.
        """
        incarnation = self.fleet.registry.members[name].record.incarnation
        await self.turner.turn(name, role)
        self._set_role(name, role)
        await self._shared(f"roles/{name}", {"role": role.value, "incarnation": incarnation})

    async def drain(self, name: str, drains: bool) -> None:
        """Give an instance nothing new, or again; at every router."""
        self._drained(name, drains)
        incarnation = self.fleet.registry.members[name].record.incarnation
        await self._shared(f"drains/{name}", {"drains": drains, "incarnation": incarnation})

    def _drained(self, name: str, drains: bool) -> None:
        self.fleet.drain(name, drains)
        self.gateway.changed.set()
        if drains:
            self.gateway.empty(name)

    async def change_policies(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Route and change roles by other settings from now on, at every router; all settings.

        Raises:
            ConfigError: one is not known, has a bad value, or is fixed at the start.
        """
        found = self._apply(values)
        self._shared_settings |= values
        await self._shared("settings/policies", self._shared_settings)
        return found

    def _apply(self, values: Mapping[str, Any]) -> dict[str, Any]:
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
            "removed/": self._removed_changed,
            "settings/": self._settings_changed,
        }
        # Several processes may serve at one address.
        self._begin("etcd", functools.partial(etcd.run, f"{address}#{os.getpid()}"))
        for prefix, changed in watched.items():
            self._begin(f"etcd's {prefix}", functools.partial(etcd.watch, prefix, changed))

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
        if value is None or value.get("role") not in [role.value for role in Role]:
            return
        self._roles[name] = value
        if self._is_of(name, value):
            self._set_role(name, Role(value["role"]))

    def _drain_changed(self, name: str, value: Mapping[str, Any] | None) -> None:
        if value is None:
            return
        self._drains[name] = value
        if self._is_of(name, value):
            self._drained(name, bool(value.get("drains")))

    def _removed_changed(self, name: str, value: Mapping[str, Any] | None) -> None:
        self._removed[name] = str((value or {}).get("incarnation", ""))
        member = self.fleet.registry.members.get(name)
        if member is not None and self.was_removed(member.record):
            self.leave(name)

    def _settings_changed(self, name: str, value: Mapping[str, Any] | None) -> None:
        if not value or value == self._shared_settings:
            return
        try:
            self._apply(value)
            self._shared_settings = dict(value)
        except ConfigError as error:
            logger.warning("etcd has settings that cannot be: %s", error)

    def _is_of(self, name: str, value: Mapping[str, Any]) -> bool:
        """Whether etcd speaks of the instance that is there, and not of one before it."""
        member = self.fleet.registry.members.get(name)
        return member is not None and member.record.incarnation == value.get("incarnation")


def _guarded(section: RouterSection) -> RoutingPolicy:
    def failed(error: Exception) -> None:
        logger.error("the policy %s failed", section.routing, exc_info=error)

    return Guarded(routing_of(section), failed)


def _views(fleet: Fleet) -> list[InstanceView]:
    return fleet.views(time.monotonic())
