"""Claim: killing instances costs no token: answers go on elsewhere, and nothing is sent twice.

Streams run through a router while instances are killed with SIGKILL and started again. Each answer
is compared with what an undisturbed instance says:

    python -m benchmarks.router_faults --interrupted 1000            # stand-in engines
    python -m benchmarks.router_faults --interrupted 100 --real      # vLLM servers
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.lab.instances import MODEL, START_S, Instance, session_of, streamed, vllm_instance
from benchmarks.lab.model import ROOT
from benchmarks.lab.router import RouterProcess, cores, route
from benchmarks.lab.server import free_port
from benchmarks.lab.stub_engine import generated, text_of, tokens_of

STUBS, STREAMS, TOKENS, TOKEN_MS = 4, 40, 150, 10.0
REAL, REAL_STREAMS, REAL_TOKENS = 2, 16, 160


@dataclass
class Outcome:
    """What came of all streams.

    Attributes:
        streams: that were answered.
        interrupted: how often one went on elsewhere.
        wrong: answers that differ from the undisturbed one.
        failed: requests that ended in an error.
        kills: of instances.
    """

    streams: int = 0
    interrupted: int = 0
    wrong: int = 0
    failed: int = 0
    kills: int = 0
    errors: list[str] = field(default_factory=list)


def stubs() -> list[Instance]:
    """Stand-in engines."""
    made = []
    for _ in range(STUBS):
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.lab.stub_engine", "--port", str(port),
                   "--token-ms", str(TOKEN_MS), "--prompt-ms", "20"]  # fmt: skip
        made.append(Instance(port, command, dict(os.environ)))
    return made


def servers() -> list[Instance]:
    """Real vLLM servers, each on a core of its own."""
    return [vllm_instance(core) for core in itertools.islice(itertools.cycle(cores()), REAL)]


async def moved(session: aiohttp.ClientSession, router: RouterProcess) -> int:
    """How many answers went on elsewhere, by the router's own count."""
    async with session.get(router.url + "/metrics") as answer:
        found = re.search(r"^xllm:router_moved_total ([\d.]+)", await answer.text(), re.M)
    return round(float(found[1])) if found else 0


async def tried(
    options: argparse.Namespace, router: RouterProcess, made: list[Instance]
) -> Outcome:
    """Stream, kill and compare until enough streams were interrupted."""
    outcome = Outcome()
    tokens, streams = (REAL_TOKENS, REAL_STREAMS) if options.real else (TOKENS, STREAMS)
    model = MODEL if options.real else "stub"
    expected: dict[str, str] = {}
    async with session_of() as session:

        async def undisturbed(prompt: str, body: dict[str, Any]) -> str:
            if not options.real:
                following = itertools.islice(generated(tokens_of(prompt)), tokens)
                return "".join(map(text_of, following))
            if prompt not in expected:
                expected[prompt] = await streamed(session, made[0].url, body)
            return expected[prompt]

        def body_of(prompt: str) -> dict[str, Any]:
            return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip

        prompts = [f"Tell me story number {n} about a river." for n in range(streams)]
        if options.real:  # before anything is disturbed
            for prompt in prompts:
                await undisturbed(prompt, body_of(prompt))

        async def client(number: int) -> None:
            while outcome.interrupted < options.interrupted:
                prompt = prompts[number]
                body = body_of(prompt)
                try:
                    found = await streamed(session, router.url, body)
                except (ValueError, aiohttp.ClientError) as error:
                    outcome.failed += 1
                    outcome.errors.append(str(error)[:300])
                    await asyncio.sleep(0.5)
                    continue
                outcome.streams += 1
                outcome.wrong += found != await undisturbed(prompt, body)

        async def killer() -> None:
            rng = random.Random(0)
            while outcome.interrupted < options.interrupted:
                await asyncio.sleep(rng.uniform(0.5, 1.5) * (8.0 if options.real else 1.0))
                victim = rng.choice(made)
                victim.kill()
                outcome.kills += 1
                victim.start()
                await victim.up(session)
                await asyncio.to_thread(router.await_instances, len(made), START_S)
                outcome.interrupted = await moved(session, router)
                print(
                    f"{outcome.kills} kills, {outcome.interrupted} streams interrupted, "
                    f"{outcome.streams} answered, {outcome.wrong} wrong, {outcome.failed} failed",
                    flush=True,
                )

        await asyncio.gather(killer(), *(client(number) for number in range(streams)))
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Streams, kills, prints; status 1 if a token was lost or doubled, or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--interrupted", type=int, default=1000, help="streams")
    parser.add_argument("--real", action="store_true", help="vLLM servers, not stand-ins")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "router_faults.json"
    )
    options = parser.parse_args(arguments)
    made = servers() if options.real else stubs()
    addresses = ",".join(instance.url for instance in made)
    try:
        for instance in made:
            instance.start()
        with route(
            "--routing", "least_loaded", "--instances", addresses, "--probe-s", "0.2"
        ) as router:
            router.await_instances(len(made), START_S)
            outcome = asyncio.run(tried(options, router, made))
    finally:
        for instance in made:
            instance.kill()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")
    print(f"{outcome.interrupted} streams went on elsewhere over {outcome.kills} kills")
    print(f"answers that lost or doubled a token: {outcome.wrong} of {outcome.streams}")
    print(f"requests that failed: {outcome.failed} {outcome.errors[:3] or ''}")
    return 1 if outcome.wrong or outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
