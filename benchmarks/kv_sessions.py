"""Claim: sessions whose KV outgrows the devices are served faster with tiers than without.

Two real vLLM servers behind the router. Sessions of several turns come in turn, so that between two
turns of one all others have had theirs; in the end they hold three times what the devices hold.
Each round takes all systems, each on fresh servers and with the same prompts:

    python -m benchmarks.kv_sessions --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from benchmarks.kv_tiers import prompt_of
from benchmarks.lab.instances import MODEL, Instance, session_of, vllm_instance
from benchmarks.lab.machine import OthersMeter, cpu_name
from benchmarks.lab.nixl import nixl_env
from benchmarks.lab.results import percentiles
from benchmarks.lab.router import TOKEN, RouterProcess, cores, route
from benchmarks.lab.server import own_modules

BLOCK, LONGEST = 128, 2048
INSTANCES = 2
DEVICE_TOKENS = INSTANCES * LONGEST  # the least that vLLM takes for one request of this length
FIRST_WORDS, MORE_WORDS, TOKENS = 250, 40, 16  # of a first turn, of others, and in each answer
HOST_GIB = 1.0
_START_S = 900.0  # of both side by side, on a machine that may do more than this
SLOS = {"xllm_ttft_ms": 10_000.0, "xllm_tpot_ms": 300.0}  # what one core can keep
WITHOUT, VLLMS, OURS, APART = "no tiers", "vLLM's tiers", "xllm", "xllm, prefill and decode apart"
SYSTEMS = (WITHOUT, VLLMS, OURS, APART)


@dataclass(frozen=True)
class Answer:
    """One turn: which one it was, tokens of its prompt, those not computed, TTFT, and text."""

    turn: int
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    text: str


@dataclass(frozen=True)
class Round:
    """A round of one system: answers by session and turn, seconds, others' share of the machine."""

    answers: Sequence[Sequence[Answer]]
    took_s: float
    others: float


def main() -> None:
    """Runs the comparison."""
    options = _options()
    console = Console()
    found: dict[str, list[Round]] = {system: [] for system in options.systems}
    order = list(found)
    for number in range(options.rounds):
        for system in order:
            console.print(f"round {number + 1} of {options.rounds}: {system}")
            found[system].append(measure(system, number, options))
        order.append(order.pop(0))
    console.print(_table(found))
    most = max(one.others for rounds in found.values() for one in rounds)
    console.print(f"{cpu_name()}; others took {most:.0%} of it at most")
    if options.json:
        plain = {s: [dataclasses.asdict(one) for one in rounds] for s, rounds in found.items()}
        options.json.write_text(json.dumps(plain, indent=1))


def measure(system: str, number: int, options: argparse.Namespace) -> Round:
    """One round of one system on fresh servers."""
    with ExitStack() as stack:
        router = stack.enter_context(route("--routing", options.routing))
        for core, role in zip(cores(), ("prefill", "decode"), strict=False):
            instance = _instance(system, core, role, router)
            stack.callback(instance.stop)
            instance.start()
        router.await_instances(INSTANCES, timeout_s=_START_S)
        return asyncio.run(_sessions(router.url, number, options))


def _instance(system: str, core: int, role: str, router: RouterProcess) -> Instance:
    service = {"routers": router.url, "token": TOKEN, "role": role if system == APART else "mixed"}
    settings: dict[str, object] = {"service": service}
    blocks = LONGEST // BLOCK + 1  # one of vLLM's blocks is nobody's
    args = ["--num-gpu-blocks-override", str(blocks), "--enable-prompt-tokens-details"]
    plugins = "xllm.scheduler,xllm.service"
    if system in (OURS, APART):
        plugins += ",xllm.kv"
        transfer = "nixl" if system == APART else "none"
        settings["kv"] = {"host_gib": HOST_GIB, "transfer": transfer}
    elif system == VLLMS:
        from benchmarks.lab.vllm_tiers import transfer_config

        args += ["--kv-transfer-config", transfer_config(int(HOST_GIB * 2**30))]
    args += ["--plugins", plugins, "--xllm-config", json.dumps(settings)]
    return vllm_instance(core, args, own_modules() | nixl_env())


async def _sessions(url: str, number: int, options: argparse.Namespace) -> Round:
    """All sessions' first turns, then all their second ones; so many at once."""
    rng, turns = random.Random(number), options.turns
    lines = [
        [prompt_of(rng, MORE_WORDS if turn else FIRST_WORDS) for turn in range(turns)]
        for _ in range(options.sessions)
    ]
    answers: list[list[Answer]] = [[] for _ in lines]
    over = [[asyncio.Event() for _ in range(turns)] for _ in lines]
    waiting = iter([(turn, one) for turn in range(turns) for one in range(len(lines))])

    async def take_turns(client: aiohttp.ClientSession) -> None:
        for turn, one in waiting:
            if turn:
                await over[one][turn - 1].wait()
            said = [answer.text for answer in answers[one]]
            answers[one].append(await _asked(client, url, f"{number}-{one}", lines[one], said))
            over[one][turn].set()

    async with session_of() as client, asyncio.TaskGroup() as group:
        began_s, others = time.monotonic(), OthersMeter()
        clients = [group.create_task(take_turns(client)) for _ in range(options.at_once)]
        await asyncio.gather(*clients)
        return Round(answers, time.monotonic() - began_s, others.share())


async def _asked(
    client: aiohttp.ClientSession, url: str, name: str, lines: Sequence[str], said: Sequence[str]
) -> Answer:
    """The next turn of a session, streamed."""
    messages = []
    for line, answer in zip(lines, said, strict=False):
        messages += [_message("user", line), _message("assistant", answer)]
    body = {
        "model": MODEL, "messages": [*messages, _message("user", lines[len(said)])],
        "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "vllm_xargs": SLOS,
    }  # fmt: skip
    began_s, first_s, text = time.monotonic(), 0.0, ""
    usage: dict[str, Any] = {}
    headers = {"x-session-id": name}
    async with client.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        async for event in response.content:
            data = event.removeprefix(b"data: ").strip()
            if not data or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if piece and not first_s:
                first_s = time.monotonic()
            text += piece
            usage = chunk.get("usage") or usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(len(said), usage["prompt_tokens"], cached, first_s - began_s, text)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _table(found: Mapping[str, Sequence[Round]]) -> Table:
    table = Table("system", "hit rate", "TTFT p50, s", "p90", "of none", "requests/s", "same text")
    base = _texts(next(iter(found.values())))
    ttft_s: float | None = None
    largest = 0
    for system, rounds in found.items():
        answers = [answer for one in rounds for session in one.answers for answer in session]
        tokens = sum(answer.prompt_tokens for answer in answers)
        ttft = percentiles(answer.ttft_s for answer in answers if answer.turn)
        assert ttft.p50 is not None
        assert ttft.p90 is not None
        ttft_s = ttft_s or ttft.p50
        rate = len(answers) / sum(one.took_s for one in rounds)
        texts = _texts(rounds)
        same = sum(mine == theirs for mine, theirs in zip(texts, base, strict=True))
        hits = sum(answer.cached_tokens for answer in answers) / tokens
        table.add_row(
            system, f"{hits:.3f}", f"{ttft.p50:.3f}", f"{ttft.p90:.3f}",
            f"{ttft.p50 / ttft_s:.3f}", f"{rate:.3f}", f"{same} of {len(texts)}",
        )  # fmt: skip
        largest = max(sum(s[-1].prompt_tokens for s in one.answers) for one in rounds)
    table.caption = (
        f"TTFT of all turns but the first; sessions hold {largest / DEVICE_TOKENS:.1f} times what "
        f"{INSTANCES} devices do ({DEVICE_TOKENS} tokens)"
    )
    return table


def _texts(rounds: Sequence[Round]) -> list[str]:
    return [answer.text for one in rounds for session in one.answers for answer in session]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fresh servers of each system")
    parser.add_argument("--sessions", type=int, default=8, help="sessions in each round")
    parser.add_argument("--turns", type=int, default=4, help="turns of each session")
    parser.add_argument("--at-once", type=int, default=2, help="requests under way")
    parser.add_argument("--routing", default="slo_aware", help="the router's policy")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
