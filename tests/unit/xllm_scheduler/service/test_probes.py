"""Instances that stop to answer, are forgotten or come back; clock and answers are given."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.xllm_scheduler.service.test_fleet import ask, at, fleet
from xllm_scheduler.service import probes
from xllm_scheduler.service.breaker import Breaker
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.registry import Health


class World:
    """A fleet of two, its watch, and who of them answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.down: set[str] = set()
        self.takes_s = 0.0
        self.fleet: Fleet = fleet("a", "b", new_breaker=lambda: Breaker(failures=1))
        self.suspected: list[str] = []
        self.lost: list[str] = []
        urls = {m.record.url: name for name, m in self.fleet.registry.members.items()}

        async def healthy(session: Any, url: str) -> bool:
            self.now_s += self.takes_s
            return urls[url] not in self.down

        monkeypatch.setattr(probes, "healthy", healthy)
        session: Any = None
        self.watch = probes.Watch(
            self.fleet, session, lambda: self.now_s, 1.0, self.suspected.append, self.lost.append
        )

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.now_s += 1.1
            await self.watch.look()

    def goes_to(self) -> set[str]:
        """Who gets requests."""
        return {at(self.fleet, ask(f"{self.now_s} {n}")) for n in range(6)}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_two_probes_in_a_row_make_a_suspect(world: World) -> None:
    world.down = {"a"}
    await world.look()
    assert world.suspected == []
    await world.look()
    assert world.suspected == ["a"]
    assert world.goes_to() == {"b"}


async def test_a_router_that_stands_still_itself_blames_nobody(world: World) -> None:
    world.down, world.takes_s = {"a"}, 20.0
    await world.look(3)
    assert world.suspected == []
    world.takes_s = 0.0
    await world.look(2)
    assert world.suspected == ["a"]


async def test_what_it_failed_while_it_was_down_is_not_held_against_it(world: World) -> None:
    world.fleet.place(ask("r"), 0.0)
    world.fleet.failed("r", "a", 0.0)
    assert world.goes_to() == {"b"}
    world.down = {"a"}
    await world.look(2)
    world.down = set()
    await world.look()
    assert world.fleet.registry.members["a"].health is Health.READY
    assert "a" in world.goes_to()


async def test_what_it_fails_while_it_answers_probes_is(world: World) -> None:
    world.fleet.place(ask("r"), 0.0)
    world.fleet.failed("r", "a", 0.0)
    await world.look(3)
    assert world.goes_to() == {"b"}


async def test_one_that_reports_itself_is_back_too(world: World) -> None:
    world.fleet.place(ask("r"), 0.0)
    world.fleet.failed("r", "a", 0.0)
    world.down = {"a"}
    await world.look(2)
    world.fleet.answered("a", world.now_s + 1.0)  # as a beat does
    await world.look()
    assert "a" in world.goes_to()


async def test_one_that_stays_away_is_lost(world: World) -> None:
    world.down = {"a"}
    await world.look(30)
    assert world.lost == ["a"]
    assert set(world.fleet.registry.members) == {"b"}
