"""``xllm profile``: measures a live engine from outside and fits a step-time profile to it.

Prefills of several lengths alone give the prefill terms, batches of several sizes and contexts the
decode terms. What TTFT holds beside the step, from the client to the scheduler and back, becomes
``request_ms``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_plugins.errors import ConfigError, NotAvailableError, XllmError
from xllm_plugins.latency import StepShape, StepTime, fitted
from xllm_scheduler.simulate.profiles import Profile

if TYPE_CHECKING:
    import aiohttp

_PREFILLS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_BATCHES = (1, 2, 4, 8, 16, 32)
_CONTEXTS = (32, 512)
_REPEATS = 3
_DECODED = 24  # tokens of each request in a batch that is measured
_FEWEST = 8  # steps together, for a median
_ATTEMPTS = 4
_COMMON_TOKENS = 1000  # token ids below, which every vocabulary has


@dataclass(frozen=True)
class Measured:
    """What was observed.

    Attributes:
        prefills: prompt tokens and TTFT in ms, each alone.
        decodes: batch size, mean context in tokens of each request, and ms per step.
        jitter: the standard deviation of the logarithm of a step's time around its median.
    """

    prefills: Sequence[tuple[int, float]]
    decodes: Sequence[tuple[int, float, float]]
    jitter: float

    def profile(self, name: str, origin: str) -> Profile:
        """The profile that explains it best."""
        shapes = [
            StepShape(decodes=batch, decode_context=round(batch * context))
            for batch, context, _ in self.decodes
        ]
        decode = fitted(shapes, [took_ms for *_, took_ms in self.decodes])
        shapes = [StepShape().with_chunk(tokens, 0) for tokens, _ in self.prefills]
        prefill = fitted(shapes, [ttft_ms for _, ttft_ms in self.prefills])
        step_time = StepTime(
            base=decode.base,
            token=prefill.token,
            square=prefill.square,
            # A chunk of d tokens after p costs (p + d)^2 - p^2 of the square term.
            cross=2.0 * prefill.square,
            decode=decode.decode,
            context=decode.context,
            ready=True,
        )
        error = {"prefill": prefill.error, "decode": decode.error}
        request_ms = max(0.0, prefill.base - decode.base)
        return Profile(name, origin, step_time, error, request_ms=request_ms, jitter=self.jitter)


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``profile``."""
    made = subparsers.add_parser(
        "profile",
        help="measure a live engine's step times, for xllm simulate --profile",
        description="Sends prompts and batches of several sizes to an idle server of vLLM's and "
        "fits a step-time profile to how long they take.",
    )
    made.set_defaults(run=run)
    made.add_argument("--base-url", required=True, help="such as http://localhost:8000")
    made.add_argument("--model", help="its name there; default: the first that it serves")
    made.add_argument("--api-key", default="", help="if the server wants one")
    made.add_argument("--most-tokens", type=int, default=2048, help="the longest prompt")
    made.add_argument("--most-batch", type=int, default=32, help="the largest batch")
    made.add_argument("--output", type=Path, required=True, help="the profile's file")


def run(args: argparse.Namespace) -> int:
    """Measure, fit, write; the exit status."""
    lengths = [n for n in _PREFILLS if n <= args.most_tokens]
    batches = [n for n in _BATCHES if n <= args.most_batch]
    for option, found in (("--most-tokens", lengths), ("--most-batch", batches)):
        if len(found) < 3:
            raise ConfigError(f"{option} is too small for a fit; allowed are three sizes or more.")
    try:
        model, measured = asyncio.run(
            measure(args.base_url, args.model, lengths, batches, api_key=args.api_key, say=print)
        )
    except ModuleNotFoundError as error:
        raise NotAvailableError(
            f"xllm profile needs {error.name}; pip install 'xllm-plugins[simulate]' brings it."
        ) from error
    day = time.strftime("%Y-%m-%d")
    profile = measured.profile(model, f"measured by xllm profile at {args.base_url} on {day}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(profile.document(), indent=1) + "\n", "utf-8")
    print(
        f"{args.output}: mean error of prefill {profile.error['prefill']:.1%}, of decode "
        f"{profile.error['decode']:.1%}"
    )
    return 0


async def measure(
    url: str,
    model: str | None,
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    api_key: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, Measured]:
    """Measure an idle server.

    Args:
        url: its address.
        model: its name for the model; None for the first that it serves.
        lengths: prompt lengths, in tokens.
        batches: batch sizes.
        api_key: if it wants one.
        say: is told how it goes.

    Raises:
        XllmError: it does not answer as vLLM does.
    """
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    try:
        async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
            name = model or await _first_model(session)
            client = _Client(session, name)
            await client.batch(1, 64)  # the first request of a server is slower
            prefills = []
            for length in lengths:
                ttfts = [(await client.stream(length, 1))[0] for _ in range(_REPEATS)]
                prefills.append((length, statistics.median(ttfts) * 1e3))
                say(f"prompt of {length} tokens: {prefills[-1][1]:.1f} ms to the first token")
            decodes, around = [], []
            for batch, context in itertools.product(batches, _CONTEXTS):
                gaps_s, generated = await client.batch(batch, context)
                took_s = statistics.median(gaps_s)
                decodes.append((batch, context + generated, took_s * 1e3))
                around += [math.log(gap_s / took_s) for gap_s in gaps_s if gap_s > took_s / 2.0]
                say(f"{batch} requests after {context} tokens: {took_s * 1e3:.1f} ms per step")
            return name, Measured(prefills, decodes, statistics.pstdev(around))
    except (aiohttp.ClientError, OSError) as error:
        raise XllmError(f"{url} does not answer: {type(error).__name__}: {error}") from error


async def _first_model(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/models") as response:
        response.raise_for_status()
        name: str = (await response.json())["data"][0]["id"]
        return name


class _Client:
    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self._session, self._model = session, model
        self._rng = random.Random(time.time_ns())  # noqa: S311 - prompts that no cache has seen

    async def stream(self, prompt_tokens: int, output_tokens: int) -> list[float]:
        """When the tokens of one request came, in seconds after it was sent."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": [self._rng.randrange(_COMMON_TOKENS) for _ in range(prompt_tokens)],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        sent_s, times = time.monotonic(), []
        async with self._session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise XllmError(f"The server refuses a request: {await response.text()}")
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if data and data != b"[DONE]":
                    times.append(time.monotonic() - sent_s)
        if not times:
            raise XllmError("The server ended a request without a token.")
        return times

    async def batch(self, batch: int, context: int) -> tuple[list[float], float]:
        """Let so many requests generate together.

        Returns:
            The seconds of each step, and how many tokens each request has generated halfway.
        """
        # The prompts are computed one after the other, so the first generates longer; how much
        # longer depends on how the server shares its steps between prompts and answers.
        longest = _DECODED + 2 * batch
        for _ in range(_ATTEMPTS):
            tasks = [asyncio.create_task(self._absolute(context, longest)) for _ in range(batch)]
            streams = await asyncio.gather(*tasks)
            from_s = max(times[0] for times in streams)
            to_s = min(times[-1] for times in streams)
            steps = [t for t in streams[0] if from_s <= t <= to_s]
            gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
            if len(gaps) >= _FEWEST:
                middle_s = (from_s + to_s) / 2.0
                return gaps, statistics.fmean(bisect(times, middle_s) for times in streams)
            longest *= 2
        raise XllmError(
            f"{batch} requests did not generate together for {_FEWEST} steps, not even with "
            f"{longest // 2} tokens each; a smaller --most-batch is needed."
        )

    async def _absolute(self, prompt_tokens: int, output_tokens: int) -> list[float]:
        sent_s = time.monotonic()
        return [sent_s + t for t in await self.stream(prompt_tokens, output_tokens)]
