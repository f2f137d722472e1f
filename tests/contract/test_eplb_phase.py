"""What a worker is told to compute is noted for the row of vLLM's window that its step fills."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.eplb import eplb_state
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

from xllm_eplb.phases import is_prefill
from xllm_plugins.compat import eplb_phase, eplb_policy

pytestmark = pytest.mark.vllm

WINDOW, INTERVAL, RANKS = 4, 6, 2
SLOTS = torch.tensor([[0, 1, 2, 0], [2, 0, 1, -1]])  # of two layers: the expert in each
PREFILL, DECODE = {"a": 900, "b": 1}, {"a": 1, "b": 1}
DUMMY: dict[str, int] = {}


class Ranks:
    """A rank's worker and vLLM's own ``EplbState``, beside another rank that counts the same."""

    def __init__(self) -> None:
        config: Any = SimpleNamespace(eplb_config=SimpleNamespace(use_async=False))
        self.state = eplb_state.EplbState(config, torch.device("cpu"))
        self.state.expert_load_window_size = WINDOW
        self.state.expert_rearrangement_step_interval = INTERVAL
        self.state.num_valid_physical_experts = 4  # vLLM 0.23's
        self.model = SimpleNamespace(
            expert_load_pass=torch.zeros(2, 4, dtype=torch.int32),
            expert_load_window=torch.zeros(WINDOW, 2, 4, dtype=torch.int32),
            physical_to_logical_map=SLOTS,
            model=SimpleNamespace(num_logical_experts=3),
            rebalanced=False,
        )
        self.state.model_states["model"] = self.model
        self.worker = WorkerWrapperBase.__new__(WorkerWrapperBase)
        self.worker.mm_receiver_cache = None
        self.worker.worker = SimpleNamespace(execute_model=lambda scheduler_output: "done")

    def step(self, scheduled: dict[str, int], tokens: int) -> None:
        """One engine step in which each slot gets so many tokens."""
        if scheduled:
            output = SchedulerOutput.make_empty()
            output.num_scheduled_tokens = scheduled
            assert self.worker.execute_model(output) == "done"
        self.model.expert_load_pass.fill_(tokens)
        self.state.step(is_dummy=not scheduled)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What prefill steps had, as each plan begins."""
    found: list[Any] = []

    def rearrange(self: Any, is_profile: bool = False, **more: Any) -> None:
        pass

    def all_reduce(tensor: torch.Tensor, group: Any) -> None:
        tensor.mul_(RANKS)

    def begins(state: Any) -> None:
        found.append(None if state is None else eplb_phase.prefill_loads(state))

    state = eplb_state.EplbState
    for owner, name, value in (
        (WorkerWrapperBase, "execute_model", WorkerWrapperBase.execute_model),
        (state, "step", state.step),
        (state, "add_model", state.add_model),
        (state, "rearrange", rearrange),
        (eplb_state, "all_reduce", all_reduce),
        (eplb_state, "get_ep_group", lambda: SimpleNamespace(device_group=None)),
        (eplb_state, "CpuGpuEvent", SimpleNamespace),  # vLLM 0.23's needs a GPU
        (eplb_phase, "_computes", 0),
    ):
        monkeypatch.setattr(owner, name, value)
    for _ in range(2):  # every process may, several times
        eplb_phase.install(is_prefill)
        eplb_policy.install(lambda config, experts: None, lambda seconds: None, begins)
    return found


def test_rows_of_prefill_steps_are_added_up_over_steps_and_ranks(begun: list[Any]) -> None:
    ranks = Ranks()
    # The window covers the last four steps; one of them is a dummy, which counts nowhere.
    for number, scheduled in enumerate((PREFILL, PREFILL, PREFILL, DECODE, PREFILL, DUMMY)):
        ranks.step(scheduled, 10**number)
    ((load, share),) = begun.pop()
    tokens = RANKS * (10**2 + 10**4)
    assert load.tolist() == [[2 * tokens, tokens, tokens], [tokens] * 3]
    assert share == pytest.approx(2 / 3)
    # It is a part of what vLLM adds up of the same rows.
    window = ranks.model.expert_load_window
    assert RANKS * int(window[:3, 0, 0].sum()) == tokens + RANKS * 10**3


def test_the_next_window_takes_the_rows_of_the_last(begun: list[Any]) -> None:
    ranks = Ranks()
    for scheduled in (PREFILL,) * INTERVAL + (DECODE,) * INTERVAL:
        ranks.step(scheduled, 1)
    assert [found[0][1] for found in begun] == [1.0, 0.0]
    assert not begun[1][0][0].any()


def test_steps_that_are_not_recorded_change_no_row(begun: list[Any]) -> None:
    ranks = Ranks()
    for scheduled in (PREFILL,) * INTERVAL + (DECODE,) * (INTERVAL - WINDOW) + (DUMMY,) * WINDOW:
        ranks.step(scheduled, 1)
    assert [found[0][1] for found in begun] == [1.0, 1.0]


def test_before_a_worker_was_told_anything_nothing_is_known(begun: list[Any]) -> None:
    ranks = Ranks()
    for _ in range(INTERVAL):
        ranks.step(DUMMY, 1)
    assert begun == [[None]]


def test_a_plan_from_something_else_than_the_window_has_no_phases(begun: list[Any]) -> None:
    state = Ranks().state
    state.rearrange(is_profile=True)
    state.rearrange(rank_mapping={0: 0})
    assert begun == [None, None]


def test_several_models_are_told_one_after_another(begun: list[Any]) -> None:
    ranks = Ranks()
    draft = SimpleNamespace(**vars(ranks.model))
    draft.expert_load_window = torch.ones(WINDOW, 2, 4, dtype=torch.int32)
    ranks.step(PREFILL, 0)
    ranks.state.model_states["draft"] = draft
    eplb_phase._rows(ranks.state)[:] = np.array([1, 2, 2, 1])
    first, second = eplb_phase.prefill_loads(ranks.state)
    assert first is not None
    assert second is not None
    assert (first[0].sum(), second[0].sum()) == (0.0, RANKS * 2 * 7)
    assert first[1] == second[1] == 0.5
