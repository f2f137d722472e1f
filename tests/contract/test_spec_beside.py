"""Beside vLLM's drafting model ours drafts from texts, says how far it drafts, and has the say."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker import gpu_model_runner

from tests.contract.test_spec_proposer import arguments, config_of, output
from tests.contract.test_spec_width import DRAFT, MOST, STEERED
from xllm_plugins.compat import spec_beside, spec_proposer, vllm_version
from xllm_plugins.config import Mode
from xllm_plugins.features import Attachment
from xllm_spec_decode import plugin
from xllm_spec_decode.config import Choice, SpecDecodeSection

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        vllm_version() == "0.23.0", reason="its runner takes no length of drafts from a step's plan"
    ),
]
TEXT = [*range(1, 31), *range(1, 20)]  # goes on with 20, 21, 22, ...


class Runner(gpu_model_runner.GPUModelRunner):  # type: ignore[misc]
    """As much of vLLM's runner as has a model draft, always the token 50."""

    def __init__(self, drafter: Any) -> None:  # without vLLM's
        self.drafter = drafter
        self.asked: list[int] = []
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True, False]))
        self.input_batch = SimpleNamespace(
            req_ids=["one", "prompt"],
            vocab_size=1000,
            num_prompt_tokens=np.array([4, 9, 0], np.int32),
            num_tokens_no_spec=np.array([len(TEXT), 6, 0], np.int32),
            token_ids_cpu=np.zeros((3, 64), np.int32),
        )
        self.input_batch.token_ids_cpu[0, : len(TEXT)] = TEXT

    def propose_draft_token_ids(self, scheduler_output: Any, sampled_token_ids: Any) -> Any:
        width = scheduler_output.num_spec_tokens_to_schedule
        self.asked.append(width)
        return torch.full((2, width), 50)

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        return spec_decode_metadata


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load_model(self: Any, target_model: Any) -> None:
        self.loaded = target_model

    originals = Runner.propose_draft_token_ids, Runner._sample
    monkeypatch.setattr(gpu_model_runner, "GPUModelRunner", Runner)
    monkeypatch.setattr(SpecDecodeBaseProposer, "load_model", load_model)
    spec_proposer.install()
    spec_beside.install(plugin._beside_model)
    spec_beside.install(plugin._beside_model)  # every process may, several times
    yield
    Runner.propose_draft_token_ids, Runner._sample = originals  # type: ignore[method-assign]


def config(choice: Choice = Choice.BEST, **changed: Any) -> SimpleNamespace:
    made = config_of(drafter=choice)
    made.scheduler_config.async_scheduling = changed.get("asynchronous", False)
    made.use_v2_model_runner = changed.get("v2", False)
    made.parallel_config = SimpleNamespace(world_size=changed.get("world_size", 1))
    sampled = changed.get("draft_sample_method", "greedy")
    drafter = SimpleNamespace(max_model_len=changed.get("longest", 64))
    made.speculative_config = SimpleNamespace(
        **STEERED, draft_sample_method=sampled, draft_model_config=drafter
    )
    return made


def runner(made: Any) -> Runner:
    drafter = SpecDecodeBaseProposer.__new__(SpecDecodeBaseProposer)
    drafter.vllm_config = made
    drafter.load_model("the model")
    return Runner(drafter)


def step(one: Runner, said: Any, **fields: Any) -> tuple[Any, int]:
    """The drafts after a step, and how many tokens the model was asked for."""
    done = output(num_spec_tokens_to_schedule=MOST, **fields)
    found = one.propose_draft_token_ids(done, said)
    return found, one.asked[-1]


def test_each_request_has_the_better_draft_and_prompts_have_none() -> None:
    made = runner(config())
    assert made.drafter.loaded == "the model"
    said = torch.tensor([[20], [77]])  # what the unfinished prompt says is not kept
    (drafts, _), batch = step(made, said), made.input_batch
    assert drafts == [[21, 22, 23], []]
    assert batch.token_ids_cpu[0, len(TEXT)] == 20
    assert batch.token_ids_cpu[1, 6] == 0
    assert batch.num_tokens_no_spec[0] == len(TEXT)  # its own books vLLM keeps itself


def test_the_model_is_asked_for_as_many_tokens_as_are_tried() -> None:
    made = runner(config(Choice.SUFFIX))  # which knows nothing yet
    batch, widths = made.input_batch, []
    for token in (3, 7, 9, 8):
        drafts, width = step(made, torch.tensor([[token, -1], [77, -1]]))
        batch.num_tokens_no_spec[0] += 1
        widths.append(width)
        assert drafts == [[50] * width, []]
    assert widths == [3, 2, 1, 0]


def test_lists_are_taken_where_vllm_has_kept_its_books() -> None:
    made = runner(config())
    made.input_batch.token_ids_cpu[0, len(TEXT)] = 20
    made.input_batch.num_tokens_no_spec[0] += 1
    assert step(made, [[20], []])[0] == [[21, 22, 23], []]


def test_what_was_accepted_is_seen() -> None:
    made = runner(config())
    step(made, torch.tensor([[20], [77]]))
    made.input_batch.num_tokens_no_spec[0] += 1
    drafted = {"one": [21, 22, 23]}
    step(
        made,
        torch.tensor([[21, 22, 9, -1], [77, -1, -1, -1]]),
        scheduled_spec_decode_tokens=drafted,
    )
    found = made.drafter.xllm_beside.facts()
    assert (found["drafted"]["ngram"], found["accepted"]["ngram"]) == (3, 2)
    assert set(found["acceptance"]) == {"ngram", "suffix", "draft_model"}
    assert {"pass", "pass_request"} < set(found["step_ms"])
    assert plugin.worker_facts(None) == found


@pytest.mark.parametrize("method", ["begin", "finish"])
def test_a_failure_leaves_the_models_drafts(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    made = runner(config())
    monkeypatch.setattr(f"xllm_spec_decode.speculator.Speculator.{method}", lambda *args: 1 / 0)
    for _ in range(2):
        drafts, _ = step(made, torch.tensor([[20], [77]]))
        assert (drafts == 50).all()
    assert "ZeroDivisionError" in made.drafter.xllm_beside.facts()["stands_back"]


@pytest.mark.parametrize(
    "changed",
    [
        {"asynchronous": True},
        {"v2": True},
        {"world_size": 2},
        {"draft_sample_method": "probabilistic"},
        {"longest": 32},
    ],
)
def test_elsewhere_the_scheduler_steers_the_model_alone(changed: dict[str, Any]) -> None:
    made = config(**changed)
    assert runner(made).drafter.xllm_beside is None
    assert plugin._steered_width(made) is not None
    assert plugin._steered_width(config()) is None
    section = SpecDecodeSection(mode=Mode.ON)
    given = arguments(speculative_config=DRAFT)
    targets = [plugin.attach(Attachment(given, one, section)) for one in (made, config())]
    assert targets == ["vllm.v1.core.sched.scheduler", "vllm.v1.spec_decode.llm_base_proposer"]


def test_a_step_without_drafts_is_sampled_as_without_a_drafting_model() -> None:
    none, some = SimpleNamespace(max_spec_len=0), SimpleNamespace(max_spec_len=2)
    assert [runner(config())._sample(None, drafted) for drafted in (none, some)] == [None, some]
    assert runner(config(world_size=2))._sample(None, none) is none


def test_without_us_nothing_stands_beside() -> None:
    made = config()
    made.additional_config = {}
    one = runner(made)
    assert one.drafter.xllm_beside is None
    drafts, width = step(one, torch.tensor([[20], [77]]))
    assert (tuple(drafts.shape), width) == ((2, MOST), MOST)
