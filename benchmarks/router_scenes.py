"""Claim: whatever fails beside a request, its answer is the undisturbed one.

Two real vLLM servers that move KV by NIXL, two routers over a real etcd. In each scene something is
killed, stopped or gone while answers are under way; float32, so that greedy text can be compared:

    python -m benchmarks.router_scenes
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from benchmarks.lab.etcd import EtcdServer, etcd_server
from benchmarks.lab.instances import MODEL, Instance, session_of, streamed, vllm_instance
from benchmarks.lab.model import ROOT
from benchmarks.lab.nixl import NIXL, nixl_env
from benchmarks.lab.router import TOKEN, RouterProcess, cores, route

SHORT = "Tell me about the sea and the wind."
LONG = "Tell a long story about a bridge, a river and a clockmaker. " * 60
TOKENS = 120
STOPPED_S, WITHOUT_ETCD_S, FREED_S = 20.0, 30.0, 10.0


@dataclass
class Found:
    """What a scene showed.

    Attributes:
        scene: what happened.
        answers: how many there were.
        wrong: of these, that differ from the undisturbed ones.
        failed: requests that ended in an error.
        longest_s: the longest time without a token.
        note: what else is to be told.
    """

    scene: str
    answers: int = 0
    wrong: int = 0
    failed: int = 0
    longest_s: float = 0.0
    note: str = ""


@dataclass
class Stage:
    """Everything that a scene plays on."""

    session: aiohttp.ClientSession
    etcd: EtcdServer
    routers: Sequence[RouterProcess]
    instances: Sequence[Instance]
    expected: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The instances' names, in their order."""
        return [f"127.0.0.1:{instance.port}" for instance in self.instances]

    async def ready(self) -> None:
        """Wait until all instances answer and all routers that live know them."""
        for instance in self.instances:
            await instance.up(self.session)
        for router in self.routers:
            if _lives(router):
                await asyncio.to_thread(router.await_instances, len(self.instances))

    async def roles(self, *roles: str) -> None:
        """Give each instance a role, in their order."""
        for name, role in zip(self.names, roles, strict=True):
            path = f"/xllm/v1/instances/{name}/role?role={role}"
            await asyncio.to_thread(self.routers[-1].call, "PUT", path)

    async def undisturbed(self, prompt: str) -> None:
        """Learn what the answer is."""
        self.expected[prompt] = await streamed(self.session, self.instances[0].url, body(prompt))

    async def asked(
        self,
        found: Found,
        prompt: str,
        *,
        at: int = 0,
        when: Mapping[int, Callable[[], object]] | None = None,
    ) -> None:
        """Ask, do something after so many pieces of the answer, and compare."""
        last_s = time.monotonic()

        def piece(count: int) -> None:
            nonlocal last_s
            now_s = time.monotonic()
            if count > 1:  # the first one waits for its prompt to be computed
                found.longest_s = max(found.longest_s, now_s - last_s)
            last_s = now_s
            happens = (when or {}).get(count)
            if happens is not None:
                happens()

        try:
            text = await streamed(self.session, self.routers[at].url, body(prompt), piece)
        except (ValueError, aiohttp.ClientError) as error:
            found.failed += 1
            found.note = str(error)[:120]
            return
        found.answers += 1
        found.wrong += text != self.expected[prompt]


def body(prompt: str) -> dict[str, Any]:
    """What is asked, but for the stream."""
    return {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True}  # fmt: skip


async def decode_killed(stage: Stage) -> Found:
    """The instance that generates is killed in the middle of an answer."""
    found = Found("kill -9 of the decode instance in mid-stream")
    await stage.roles("prefill", "decode")
    await stage.asked(found, SHORT, when={20: stage.instances[1].kill})
    stage.instances[1].start()
    return found


async def prefill_killed(stage: Stage) -> Found:
    """The instance that computes the prompt is killed before its KV is fetched."""
    found = Found("kill -9 of the prefill instance before the transfer")
    await stage.roles("prefill", "decode")
    asking = asyncio.create_task(stage.asked(found, LONG))
    await asyncio.sleep(0.7)
    stage.instances[0].kill()
    await asking
    stage.instances[0].start()
    return found


async def instance_stopped(stage: Stage) -> Found:
    """An instance stands still for a while, with its connections open."""
    found = Found(f"SIGSTOP of an instance for {STOPPED_S:g} s")
    await stage.roles("mixed", "mixed")
    pauses: list[asyncio.Task[None]] = []

    def pause() -> None:
        busy = max(stage.routers[0].instances().values(), key=lambda one: one["running"])
        victim = stage.instances[stage.names.index(busy["name"])]
        pauses.append(asyncio.create_task(asyncio.to_thread(victim.pause, STOPPED_S)))

    await stage.asked(found, SHORT, when={20: pause})
    await asyncio.gather(*pauses)
    return found


async def etcd_stopped(stage: Stage) -> Found:
    """Etcd is away; both routers serve on with what they know."""
    found = Found(f"etcd stopped for {WITHOUT_ETCD_S:g} s")
    await asyncio.to_thread(stage.etcd.stop)
    until_s = time.monotonic() + WITHOUT_ETCD_S
    while time.monotonic() < until_s:
        await asyncio.gather(*(stage.asked(found, SHORT, at=at) for at in (0, 1)))
    await asyncio.to_thread(stage.etcd.start)
    await stage.asked(found, SHORT)
    return found


async def client_gone(stage: Stage) -> Found:
    """A client leaves in mid-stream: the engine is to be free again."""
    found = Found("the client gone in mid-stream")
    asked = {**body(SHORT), "max_tokens": 1500, "stream": True}
    async with stage.session.post(f"{stage.routers[0].url}/v1/completions", json=asked) as answer:
        await answer.content.readline()
    began_s = time.monotonic()
    while await _running(stage):
        if time.monotonic() - began_s > FREED_S:
            found.failed = 1
            found.note = f"still running after {FREED_S:g} s"
            return found
        await asyncio.sleep(0.05)
    found.note = f"engines free after {time.monotonic() - began_s:.1f} s"
    return found


async def router_killed(stage: Stage) -> Found:
    """One of the routers is killed; its client asks the other one again. The last scene."""
    found = Found("kill -9 of one of two routers in mid-stream")

    def kill() -> None:
        os.kill(stage.routers[0].pid, signal.SIGKILL)

    broken = Found("")
    await stage.asked(broken, SHORT, when={20: kill})
    await stage.asked(found, SHORT, at=1)
    found.note = (
        "the client's stream broke" if broken.failed else "the client's stream did not break"
    )
    return found


SCENES: Sequence[Callable[[Stage], Awaitable[Found]]] = (
    decode_killed, prefill_killed, instance_stopped, etcd_stopped, client_gone, router_killed,
)  # fmt: skip


async def _running(stage: Stage) -> int:
    total = 0
    for instance in stage.instances:
        async with stage.session.get(instance.url + "/metrics") as answer:
            text = await answer.text()
        total += sum(
            round(float(n))
            for n in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)", text, re.M)
        )
    return total


def _lives(router: RouterProcess) -> bool:
    with contextlib.suppress(OSError):
        router.call("GET", "/health", timeout_s=2.0)
        return True
    return False


async def played(stage: Stage, rounds: int, only: Sequence[str]) -> list[Found]:
    """All scenes, each so many times; the last one once."""
    all_found = []
    await stage.ready()
    for prompt in (SHORT, LONG):
        await stage.undisturbed(prompt)
    for scene in SCENES:
        if only and scene.__name__ not in only:
            continue
        for _ in range(1 if scene is router_killed else rounds):
            all_found.append(await scene(stage))
            print(all_found[-1], flush=True)
            await stage.ready()
    return all_found


def table(all_found: Sequence[Found]) -> Table:
    """All of it."""
    made = Table(title="Greedy answers compared with undisturbed ones; float32")
    for heading in ("scene", "answers", "wrong", "failed", "longest without a token, s", "note"):
        made.add_column(heading, justify="left" if heading in ("scene", "note") else "right")
    for one in all_found:
        longest = f"{one.longest_s:.1f}"
        made.add_row(
            one.scene, str(one.answers), str(one.wrong), str(one.failed), longest, one.note
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays, prints; status 1 if an answer was wrong or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=1, help="of each scene")
    names = [scene.__name__ for scene in SCENES]
    parser.add_argument("--scenes", nargs="+", choices=names, default=[], help="default: all")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "router_scenes.json"
    )
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(etcd_server())
        routers = [
            stack.enter_context(route("--routing", "slo_aware", "--etcd", etcd.url))
            for _ in range(2)
        ]
        config = {"service": {"etcd": etcd.url, "token": TOKEN}, **NIXL}
        args = ["--plugins", "xllm", "--xllm-config", json.dumps(config)]
        instances = []
        for core in (cores() * 2)[:2]:
            instances.append(vllm_instance(core, args, nixl_env()))
            stack.callback(instances[-1].kill)
            instances[-1].start()

        async def play() -> list[Found]:
            async with session_of() as session:
                stage = Stage(session, etcd, routers, instances)
                return await played(stage, options.rounds, options.scenes)

        all_found = asyncio.run(play())
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = [dataclasses.asdict(one) for one in all_found]
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table(all_found))
    return 1 if any(one.wrong or one.failed for one in all_found) else 0


if __name__ == "__main__":
    sys.exit(main())
