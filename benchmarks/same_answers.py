"""Claim: greedy answers to mixed online and offline requests are the same with and without xllm.

Real servers in float32, one after the other, each with the same requests:

    python -m benchmarks.same_answers --requests 200
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
from rich.console import Console
from rich.table import Table

from benchmarks.lab.answers import Agreement, Answer, Token, compare
from benchmarks.lab.load import Json
from benchmarks.lab.machine import cpu_name
from benchmarks.lab.model import ROOT, prepare_smollm2
from benchmarks.lab.server import Server, ServerError, serve
from benchmarks.lab.workload import Ask, OnlineLoad, online_asks

LIMIT_MARGIN = 0.02  # the rounding of a batch of another size moves a log-probability by far less
CONCURRENCY = 16
SERVER_ARGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
OFFLINE: Json = {"vllm_xargs": {"xllm_class": "offline"}}


@dataclass(frozen=True)
class System:
    """One way to serve the requests."""

    server_args: tuple[str, ...] = ()
    offline_fields: Json = dataclasses.field(default_factory=dict)
    shuffled: bool = False
    """Whether the requests arrive in another order."""


PLAIN = System()
XLLM, AGAIN = "xllm", "vllm, other order"
OTHERS = {
    XLLM: System(("--plugins", "xllm"), OFFLINE),
    AGAIN: System(shuffled=True),
}


@dataclass(frozen=True)
class Served:
    """What one server answered, and what it reported of itself."""

    answers: list[Answer]
    took_s: float
    held: float
    """How many times a running offline request sat a step out; 0 without plugins."""
    offline: float
    """How many requests it took in as offline; 0 without plugins."""


def asks(requests: int, seed: int) -> list[Ask]:
    """Requests of all lengths; every second one is offline."""
    load = OnlineLoad(requests, rate=1.0, words=(20, 300), max_tokens=(8, 64))
    return [ask for _, ask in online_asks(load, seed)]


def measure(model: Path, system: System, requests: Sequence[Ask], seed: int) -> Served:
    """Answers of a fresh server, in the order of the requests."""
    order = list(range(len(requests)))
    if system.shuffled:
        random.Random(f"order-{seed}").shuffle(order)
    with serve(model, args=[*SERVER_ARGS, *system.server_args]) as server:
        began_s = time.monotonic()
        answers = asyncio.run(_answers(server, system, requests, order))
        took_s = time.monotonic() - began_s
        held, offline = _reported(server) if system.server_args else (0.0, 0.0)
    return Served(answers, took_s, held, offline)


async def _answers(
    server: Server, system: System, requests: Sequence[Ask], order: Sequence[int]
) -> list[Answer]:
    """All answers; so many clients take the next request in order when one is done."""
    answers: dict[int, Answer] = {}
    left = iter(order)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with (
        aiohttp.ClientSession(server.url, timeout=timeout) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(CONCURRENCY):
            group.create_task(_client(session, server.model, system, requests, left, answers))
    return [answers[index] for index in range(len(requests))]


async def _client(
    session: aiohttp.ClientSession,
    model: str,
    system: System,
    requests: Sequence[Ask],
    left: Iterator[int],
    answers: dict[int, Answer],
) -> None:
    for index in left:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": requests[index].prompt}],
            "max_tokens": requests[index].max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
            "return_tokens_as_token_ids": True,
            **(system.offline_fields if index % 2 else {}),
        }
        async with session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                text = await response.text()
                raise ServerError(f"request {index}: status {response.status}: {text}")
            (choice,) = (await response.json())["choices"]
        answers[index] = _answer(choice)


def _answer(choice: dict[str, Any]) -> Answer:
    tokens = tuple(
        Token(
            name=one["token"],
            logprob=one["logprob"],
            likeliest={top["token"]: top["logprob"] for top in one["top_logprobs"]},
        )
        for one in choice["logprobs"]["content"]
    )
    return Answer(choice["message"]["content"] or "", tokens)


def _reported(server: Server) -> tuple[float, float]:
    """How many times offline requests sat a step out, and how many requests there were."""
    time.sleep(2.5)  # the server asks its engine every second or two
    samples: dict[str, float] = {}
    with urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.startswith("xllm:") and 'class="offline"' in name:
            samples[name.partition("{")[0]] = float(value)
    return samples["xllm:scheduler_held_total"], samples["xllm:scheduler_requests_total"]


def table(results: dict[str, Agreement], served: dict[str, Served]) -> Table:
    """One row for each server that is compared with the plain one."""
    made = Table(title="Greedy answers beside those of vLLM without plugins")
    made.add_column("system")
    for heading in (
        "identical",
        "of",
        "same tokens",
        "their logprobs differ by",
        "largest margin",
        "offline",
        "held",
        "took, s",
    ):
        made.add_column(heading, justify="right")
    for name, one in results.items():
        made.add_row(
            name,
            str(one.identical),
            str(len(served[name].answers)),
            str(one.tokens),
            f"{one.drift:.1e}",
            f"{one.largest_margin:.4f}" if one.differences else "-",
            f"{served[name].offline:.0f}",
            f"{served[name].held:.0f}",
            f"{served[name].took_s:.0f}",
        )
    return made


def write_json(
    path: Path, options: argparse.Namespace, results: dict[str, Agreement], plain: Served
) -> None:
    """The table's figures, every difference and vLLM's answers."""
    document = {
        "setting": {"server_args": SERVER_ARGS, "requests": options.requests, "seed": options.seed},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("vllm", "torch", "xllm-plugins")},
        "systems": {
            # JSON has no infinity.
            name: json.loads(json.dumps(dataclasses.asdict(one)), parse_constant=str)
            for name, one in results.items()
        },
        "answers": [answer.text for answer in plain.answers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; status 1 if the claim does not hold."""
    options = _options(arguments)
    requests = asks(options.requests, options.seed)
    model = prepare_smollm2()
    print("vllm: starting a server and asking", flush=True)
    plain = measure(model, PLAIN, requests, options.seed)
    served: dict[str, Served] = {}
    results: dict[str, Agreement] = {}
    for name in (XLLM, AGAIN) if options.baseline else (XLLM,):
        print(f"{name}: starting a server and asking", flush=True)
        served[name] = measure(model, OTHERS[name], requests, options.seed)
        results[name] = compare(plain.answers, served[name].answers)
        write_json(options.json, options, results, plain)
        for one in results[name].differences:
            print(
                f"{name}: request {one.request} differs at token {one.position}: vLLM says "
                f"{one.ours}, this {one.theirs}; margin {one.margin:.4f}"
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table(results, served))
    failed = failures(results[XLLM], served[XLLM], options.requests // 2)
    print(
        f"claim: identical, but for choices with a margin of at most {LIMIT_MARGIN}; "
        f"records in {options.json}"
    )
    for line in failed:
        print(f"not met: {line}")
    return 1 if failed else 0


def failures(agreement: Agreement, served: Served, offline: int) -> list[str]:
    """What contradicts the claim, or makes it empty."""
    found = []
    if agreement.largest_margin > LIMIT_MARGIN:
        found.append(f"an answer differs where the margin is {agreement.largest_margin:.4f}")
    if served.offline != offline:
        found.append(f"{served.offline:.0f} requests were taken in as offline, not {offline}")
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200, help="every second one is offline")
    parser.add_argument(
        "--baseline", action="store_true", help="ask vLLM again too, in another order"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "same_answers.json"
    )
    options = parser.parse_args(arguments)
    if options.requests < 2:
        parser.error("--requests must be at least 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
