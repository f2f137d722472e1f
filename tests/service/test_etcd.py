"""Several routers over a real etcd: the same view, one that decides, and its loss survived."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from benchmarks.lab.etcd import EtcdServer, etcd_server
from tests.service.conftest import WAIT_S
from xllm_scheduler.service.etcd import Etcd
from xllm_scheduler.service.registry import Record

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="needs etcd (Debian: etcd-server)"
)


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with etcd_server() as server:
        yield server


async def until(condition: Any) -> None:
    async def wait() -> None:
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), WAIT_S)


@contextlib.asynccontextmanager
async def registered(server: EtcdServer, url: str, incarnation: str = "") -> AsyncIterator[None]:
    """An instance that keeps itself in etcd."""
    async with aiohttp.ClientSession() as session:
        etcd = Etcd(session, server.url, "/xllm")
        name = url.removeprefix("http://")
        record = Record(name, url, ("stub",), incarnation=incarnation)
        etcd.keep(f"instances/{name}", record.document())
        task = asyncio.create_task(etcd.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def names(url: Any) -> set[str]:
    return {one["name"] for one in (await url.status())["instances"]}


async def pair(router: Any, server: EtcdServer, **more: Any) -> list[Any]:
    made = []
    for number in range(2):
        own = f"http://127.0.0.1:{number + 1}"
        made.append(await router(etcd=server.url, address=own, **more))
    return made


async def test_instances_in_etcd_are_known_to_all_routers(
    etcd: EtcdServer, stub: Any, router: Any
) -> None:
    first, second = await pair(router, etcd)
    one = await stub()
    async with registered(etcd, one.url):
        for url in (first, second):
            await asyncio.wait_for(url.joined(1), WAIT_S)
            answer = await url.ask(
                "/v1/completions", {"model": "stub", "prompt": "x", "max_tokens": 2}
            )
            assert answer["choices"]


async def test_an_instance_whose_lease_ends_is_dropped_if_it_does_not_answer(
    etcd: EtcdServer, stub: Any, router: Any
) -> None:
    url = await router(etcd=etcd.url, address="http://127.0.0.1:1", suspect_s=0.5)
    one = await stub()
    async with registered(etcd, one.url):
        await asyncio.wait_for(url.joined(1), WAIT_S)

    async def serves_without_lease() -> bool:
        (found,) = (await url.status())["instances"]
        assert found["accepts"]  # whether its lease has run out or not, for it answers
        return bool(found["health"] == "unleased")

    await until(serves_without_lease)
    await one.dies()

    async def gone() -> bool:
        return not await names(url)

    await until(gone)


async def test_a_change_of_role_reaches_all_routers(
    etcd: EtcdServer, stub: Any, router: Any
) -> None:
    first, second = await pair(router, etcd)
    one = await stub()
    name = one.url.removeprefix("http://")
    async with registered(etcd, one.url):
        for url in (first, second):
            await asyncio.wait_for(url.joined(1), WAIT_S)
        await first.admin("PUT", f"/instances/{name}/role", params={"role": "decode"})
        await first.admin("POST", f"/instances/{name}/drain")

        async def agreed() -> bool:
            (found,) = (await second.status())["instances"]
            return bool(found["role"] == "decode" and found["draining"])

        await until(agreed)


async def test_one_decides_and_another_one_takes_over(etcd: EtcdServer) -> None:
    async with aiohttp.ClientSession() as session:
        made = [Etcd(session, etcd.url, "/xllm") for _ in range(2)]
        tasks = [asyncio.create_task(e.run(lead_as=f"r{n}")) for n, e in enumerate(made)]
        await until(lambda: any(e.leads for e in made))
        await asyncio.sleep(1.5)  # in which both have tried
        await until(lambda: sum(e.leads for e in made) == 1)
        leader = next(n for n, e in enumerate(made) if e.leads)
        tasks[leader].cancel()
        await made[leader].close()
        await until(lambda: made[1 - leader].leads)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_while_etcd_is_away_all_serve_on_and_then_agree_again(
    etcd: EtcdServer, stub: Any, router: Any
) -> None:
    url = await router(etcd=etcd.url, address="http://127.0.0.1:1")
    one, two = await stub(), await stub()
    body = {"model": "stub", "prompt": "x", "max_tokens": 2}
    async with registered(etcd, one.url):
        await asyncio.wait_for(url.joined(1), WAIT_S)
        etcd.stop()
        for _ in range(8):
            assert (await url.ask("/v1/completions", body))["choices"]
            await asyncio.sleep(0.5)
        await asyncio.to_thread(etcd.start)
        async with registered(etcd, two.url):
            await asyncio.wait_for(url.joined(2), WAIT_S)
            assert len(await names(url)) == 2


async def test_a_router_that_comes_later_knows_roles_removals_and_settings(
    etcd: EtcdServer, stub: Any, router: Any
) -> None:
    first = await router(etcd=etcd.url, address="http://127.0.0.1:1")
    one, two = await stub(), await stub()
    name, gone = (s.url.removeprefix("http://") for s in (one, two))
    async with registered(etcd, one.url, "1"), registered(etcd, two.url, "1"):
        await asyncio.wait_for(first.joined(2), WAIT_S)
        await first.admin("PUT", f"/instances/{name}/role", params={"role": "decode"})
        await first.admin("DELETE", f"/instances/{gone}")
        await first.admin("PUT", "/settings", json={"routing": "least_loaded"})
        second = await router(etcd=etcd.url, address="http://127.0.0.1:2")

        async def agreed() -> bool:
            status = await second.status()
            found = {i["name"]: i["role"] for i in status["instances"]}
            return bool(found == {name: "decode"} and status["routing"] == "least_loaded")

        await until(agreed)
        assert await names(first) == {name}
    async with registered(etcd, one.url, "2"):  # started again: as it says itself

        async def begun_anew() -> bool:
            roles = [
                i["role"] for url in (first, second) for i in (await url.status())["instances"]
            ]
            return roles == ["mixed", "mixed"]

        await until(begun_anew)
        third = await router(etcd=etcd.url, address="http://127.0.0.1:3")
        await asyncio.wait_for(third.joined(1), WAIT_S)
        await asyncio.sleep(0.5)

        async def knows_it_anew() -> bool:
            found = {i["name"]: i["role"] for i in (await third.status())["instances"]}
            return found == {name: "mixed"}

        await until(knows_it_anew)
