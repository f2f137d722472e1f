"""What instances tell of experts and KV tiers reaches the router when it is asked for it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.conftest import told_loads, told_tiers

TIERS = told_tiers()["kv"]["tiers"]


async def test_instances_that_balance_experts_tell_their_loads(stub: Any, router: Any) -> None:
    balanced, plain = await stub(), await stub()
    balanced.engine.eplb = told_loads()
    url = await router(balanced, plain)
    found = await url.admin("GET", "/eplb")
    assert found == {balanced.url.removeprefix("http://"): balanced.engine.eplb}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"engines": [told_tiers()]}, [TIERS]),
        ({"engines": [{}, told_tiers()]}, [{}, TIERS]),
        ({"engines": [{"kv": {}}]}, None),
        ({"instances": []}, None),
        (None, None),
    ],
    ids=["one engine", "the second of two", "no tiers", "another router", "no status"],
)
async def test_instances_with_kv_tiers_tell_what_happened_there(
    stub: Any, router: Any, status: dict[str, Any] | None, told: Any
) -> None:
    one = await stub()
    one.engine.status = status
    url = await router(one)
    expected = {} if told is None else {one.url.removeprefix("http://"): told}
    assert await url.admin("GET", "/kv/tiers") == expected


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
