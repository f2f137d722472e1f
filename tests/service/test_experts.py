"""Loads of experts reach the router when it is asked for them, from the instances that have any."""

from __future__ import annotations

from typing import Any

from tests.service.conftest import told_loads


async def test_instances_that_balance_experts_tell_their_loads(stub: Any, router: Any) -> None:
    balanced, plain = await stub(), await stub()
    balanced.engine.eplb = told_loads()
    url = await router(balanced, plain)
    found = await url.admin("GET", "/eplb")
    assert found == {balanced.url.removeprefix("http://"): balanced.engine.eplb}


async def test_an_instance_that_does_not_answer_is_left_out(stub: Any, router: Any) -> None:
    stubs = [await stub(), await stub()]
    for one in stubs:
        one.engine.eplb = told_loads()
    url = await router(*stubs, probe_s=60.0)
    await stubs[0].dies()
    assert (await url.admin("GET", "/eplb")).keys() == {stubs[1].url.removeprefix("http://")}


async def test_instances_are_not_asked_again_for_every_console(stub: Any, router: Any) -> None:
    one = await stub()
    one.engine.eplb = {"plans": 1, "devices": []}
    url = await router(one)
    first = await url.admin("GET", "/eplb")
    one.engine.eplb = {"plans": 2, "devices": []}
    assert await url.admin("GET", "/eplb") == first
