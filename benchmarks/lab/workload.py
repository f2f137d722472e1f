"""What is asked of a server: seeded prompts and arrival times, without any I/O."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_TEXT = """
about above answer apple autumn balance basket beach before begin bridge bright brother
build butter camera carry castle center change child circle city clean climb cloud coffee
color common corner cotton country cover cross daily dance decide deep desert dinner doctor
dream early earth eight empty energy engine evening every family farmer field finger finish
flower follow forest friend garden gentle glass golden grain grass green ground group happy
harbor heart heavy history honest horse house hundred island journey kitchen ladder language
large learn letter light listen little lunch machine market matter meadow middle minute
mirror money morning mother mountain music narrow nature never night north number ocean
office often orange other paper parent pencil people picture place plain planet pocket point
power pretty quick quiet rabbit rain reason record repeat river round sailor school season
second secret seven shadow share silver simple sister sleep small smooth soldier south
spring square stone story street strong sugar summer sunday table teacher thank thing
thunder ticket tiger together travel tree turtle uncle under valley village visit voice walk
water weather welcome west wheel white window winter wonder wood world yellow young
"""
WORDS = tuple(_TEXT.split())
_THINGS = ("river", "stone", "cloud", "bridge", "window", "garden", "letter", "market", "winter")


def code_editing(rng: random.Random) -> str:
    """A file to be given back with one name changed."""
    names = rng.sample(_THINGS, 4)
    file = "\n".join(f"def {n}(width, height):\n    return width * height\n" for n in names)
    return f"Rename {names[0]} to area in this file and print the whole file:\n\n{file}"


def summarising(rng: random.Random) -> str:
    """A text to be summarised."""
    text = " ".join(
        f"The {rng.choice(_THINGS)} near the {rng.choice(_THINGS)} is old." for _ in range(20)
    )
    return f"Summarise in two sentences:\n\n{text}"


def open_chat(rng: random.Random) -> str:
    """A story to be told."""
    return f"Tell me a story about a {rng.choice(_THINGS)} and a {rng.choice(_THINGS)}."


def extraction(rng: random.Random) -> str:
    """One schema to be filled from a sentence."""
    name, age, city = rng.choice(_THINGS).title(), rng.randrange(20, 80), rng.choice(_THINGS)
    schema = '{"name": "", "city": "", "age": 0}'
    return f"Answer with JSON like {schema} only. Text: {name} is {age} and lives in {city}."


def agent_loop(rng: random.Random) -> str:
    """A tool's output that repeats, to be repeated."""
    lines = "\n".join(f"-rw-r--r-- root {rng.choice(_THINGS)}.txt" for _ in range(12))
    return f"$ ls\n{lines}\n$ ls\n{lines}\nList the files again, in the same form."


TASKS = (code_editing, summarising, open_chat, extraction, agent_loop)


@dataclass(frozen=True)
class Bursts:
    """A higher rate for the first `length_s` of every `period_s`."""

    rate: float
    length_s: float
    period_s: float


@dataclass(frozen=True)
class OnlineLoad:
    """Open-loop chat: requests come when they come, however slow the answers."""

    requests: int
    rate: float
    """Requests each second, exponential gaps."""
    words: tuple[int, int] = (40, 160)
    max_tokens: tuple[int, int] = (16, 64)
    bursts: Bursts | None = None
    tasks: bool = False
    """Ask one of `TASKS` each time in place of random words."""


@dataclass(frozen=True)
class OfflineLoad:
    """Closed-loop batch: clients that each take the backlog's next request when one is done."""

    clients: int
    words: int = 300
    max_tokens: int = 96


@dataclass(frozen=True)
class Ask:
    """One request to be sent."""

    prompt: str
    max_tokens: int


def online_asks(load: OnlineLoad, seed: int) -> list[tuple[float, Ask]]:
    """Arrival times, in seconds from the window's start, and what arrives; fixed by the seed."""
    rng = random.Random(f"online-{seed}")
    timed = []
    at_s = 0.0
    for _ in range(load.requests):
        at_s = _next_arrival(load, at_s, rng)
        prompt = rng.choice(TASKS)(rng) if load.tasks else _prompt(rng, rng.randint(*load.words))
        timed.append((at_s, Ask(prompt, rng.randint(*load.max_tokens))))
    return timed


def offline_backlog(load: OfflineLoad, seed: int) -> Iterator[Ask]:
    """The endless backlog; the same for one seed."""
    rng = random.Random(f"offline-{seed}")
    while True:
        yield Ask(_prompt(rng, load.words), load.max_tokens)


def _next_arrival(load: OnlineLoad, at_s: float, rng: random.Random) -> float:
    # Thinning: draw at the highest rate, then keep an arrival with the share of it that holds then.
    highest = max(load.rate, load.bursts.rate) if load.bursts else load.rate
    while True:
        at_s += rng.expovariate(highest)
        if rng.random() * highest <= _rate_at(load, at_s):
            return at_s


def _rate_at(load: OnlineLoad, at_s: float) -> float:
    if load.bursts and at_s % load.bursts.period_s < load.bursts.length_s:
        return load.bursts.rate
    return load.rate


def _prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))
