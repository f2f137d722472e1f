"""A dry schedule finds the levers that a scheduler obeys, whatever its source reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from vllm.config import KVTransferConfig

from tests.contract.engine import BOTH, build
from xllm_plugins.compat.dry_schedule import obeyed_levers
from xllm_plugins.compat.scheduler_levers import Lever, effective_levers, possible_levers
from xllm_plugins.errors import NotAvailableError
from xllm_scheduler.plugin import _check_levers

pytestmark = pytest.mark.vllm

HOLD, BUDGET = Lever.HOLD, Lever.BUDGET


def deaf_to(base: type, lever: Lever) -> type:
    """A scheduler that undoes what was pulled, behind the names that its source reads."""

    class Deaf(base):  # type: ignore[misc]
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            for target in [self] if lever is BUDGET else self.running:
                setattr(target, lever.value, 64 if lever is BUDGET else 0)
            return super().schedule(*args, **kwargs)

    return Deaf


def switched(base: type, own: bool) -> type:
    """As vllm-ascend's: a body of its own that knows no holding, or vLLM's."""

    class Switched(deaf_to(base, HOLD) if own else base):  # type: ignore[misc]
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            assert self.max_num_scheduled_tokens
            return super().schedule(*args, **kwargs)

    return Switched


@BOTH
@pytest.mark.parametrize("role", [None, "kv_producer"])
def test_vllms_own_schedulers_obey(base: type, role: str | None) -> None:
    config = copy.copy(build(base).vllm_config)
    if role:
        config.kv_transfer_config = KVTransferConfig(kv_connector="NixlConnector", kv_role=role)
    assert obeyed_levers(base, config) == {HOLD, BUDGET}


@BOTH
@pytest.mark.parametrize("lever", [HOLD, BUDGET])
def test_one_that_is_deaf_is_found_out(base: type, lever: Lever) -> None:
    config = build(base).vllm_config
    assert obeyed_levers(deaf_to(base, lever), config) == {HOLD, BUDGET} - {lever}


@BOTH
def test_it_leaves_the_configuration_as_it_was(base: type) -> None:
    config = build(base).vllm_config
    before = repr(config)
    obeyed_levers(base, config)
    assert repr(config) == before


@BOTH
def test_where_there_are_two_bodies_the_one_that_runs_decides(base: type) -> None:
    config = build(base).vllm_config
    for own in (True, False):
        found = switched(base, own)
        assert HOLD in possible_levers(found)
        assert effective_levers(found) == {BUDGET}
    _check_levers(switched(base, own=False), config)
    with pytest.raises(NotAvailableError) as refusal:
        _check_levers(switched(base, own=True), config)
    assert str(refusal.value).endswith("does not as configured obey next_decode_eligible_step")
