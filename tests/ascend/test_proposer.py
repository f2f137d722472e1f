"""Our proposer in vllm-ascend's runner: made, told of the step and asked for drafts by its code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import vllm_ascend.ops  # noqa: F401 - before the runner, which otherwise imports itself in a ring
from vllm_ascend.worker.model_runner_v1 import AscendNgramProposer, NPUModelRunner

from tests.ascend.configs import configured, decision
from xllm_spec_decode import plugin

ON = {"xllm": {"spec_decode": {"mode": "on"}}}
TEXT = [1, 2, 3, 4, 5, 6, 1, 2, 3]


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return configured(tmp_path, additional=ON)


@pytest.fixture
def runner(config: Any) -> Any:
    """A runner as far as it drafts; one request has said the last token of its text."""
    made = object.__new__(NPUModelRunner)
    made.speculative_config, made.vllm_config = config.speculative_config, config
    made.device = "cpu"
    tokens = np.zeros((2, 64), np.int32)
    tokens[0, : len(TEXT)] = TEXT
    made.input_batch = SimpleNamespace(
        req_ids=["one"],
        num_prompt_tokens=np.array([4, 0], np.int32),
        num_tokens_no_spec=np.array([len(TEXT), 0], np.int32),
        token_ids_cpu=tokens,
    )
    made.drafter = made._get_drafter()
    made.drafter.load_model(None)
    return made


def _propose(runner: Any, sampled: list[list[int]], drafted: dict[str, list[int]]) -> Any:
    step = SimpleNamespace(
        scheduled_new_reqs=[],
        finished_req_ids=set(),
        scheduled_spec_decode_tokens=drafted,
        total_num_scheduled_tokens=1,
    )
    return runner.propose_draft_token_ids(sampled, None, step, None, None, None, 1, None)


def test_it_attaches_where_it_is_asked_for_and_steps_are_synchronous(config: Any) -> None:
    row = decision(config, "spec_decode")
    assert row["active"], row["reason"]
    assert config.speculative_config.method == "custom_class"
    assert not config.scheduler_config.async_scheduling


def test_unasked_it_stands_back(tmp_path: Path) -> None:
    config = configured(tmp_path, additional={"xllm": {"spec_decode": {"mode": "auto"}}})
    row = decision(config, "spec_decode")
    assert not row["active"]
    assert "give up asynchronous scheduling" in row["reason"]
    assert config.speculative_config is None


def test_the_runner_drafts_with_ours_and_tells_it_what_came_of_the_drafts(runner: Any) -> None:
    assert isinstance(runner.drafter, AscendNgramProposer)
    ((*draft,),) = _propose(runner, [[3]], {})
    assert draft[:2] == [4, 5]
    _propose(runner, [[4, 9]], {"one": [4, 5]})
    facts = plugin.worker_facts(None)
    assert facts is not None
    assert (facts["drafted"]["ngram"], facts["accepted"]["ngram"]) == (2, 1)


def test_what_the_runner_does_to_every_proposer_can_be_done_to_ours(runner: Any) -> None:
    runner.drafter.dummy_run(num_tokens=8, with_prefill=True, num_reqs=1)


def test_other_methods_are_vllm_ascends_to_know(runner: Any) -> None:
    runner.speculative_config = SimpleNamespace(method="unheard_of")
    with pytest.raises(ValueError, match="Unknown speculative decoding method: unheard_of"):
        runner._get_drafter()
