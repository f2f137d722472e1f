"""vLLM's runner tells our proposer what it lacks, and no draft changes what is said."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer
from vllm.v1.worker import gpu_model_runner

from tests.contract.engine import request
from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
from xllm_plugins.compat import spec_proposer, spec_sampling, vllm_version
from xllm_plugins.compat.spec_proposer import SALT
from xllm_plugins.config import Mode, section_values
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment
from xllm_scheduler.config import SchedulerSection
from xllm_spec_decode import plugin
from xllm_spec_decode.config import Choice, SpecDecodeSection
from xllm_spec_decode.plugin import PROPOSERS
from xllm_spec_decode.slots import Request

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
CPU = pytest.mark.skipif(vllm_version() != "0.32.0", reason="vLLM 0.23.0 has no kernels here")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)


def config_of(
    choice: Choice = Choice.BEST, scheduler: bool = False, **settings: Any
) -> SimpleNamespace:
    rows = [{"feature": "spec_decode", "active": True}]
    rows += [{"feature": "scheduler", "active": True}] if scheduler else []
    sections = {
        "spec_decode": section_values(SpecDecodeSection(**settings)),
        "scheduler": section_values(SchedulerSection()),
    }
    return SimpleNamespace(
        additional_config={REPORT_KEY: {"features": rows}, SETTINGS_KEY: sections},
        speculative_config=SimpleNamespace(model=PROPOSERS[choice], num_speculative_tokens=4),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(
            max_model_len=64,
            runner_type="generate",
            hf_text_config=SimpleNamespace(),
            get_num_experts=lambda: 0,
        ),
    )


class Runner:
    """As much of vLLM's runner as calls a proposer."""

    def __init__(self, config: Any) -> None:
        self.drafter = create_custom_proposer(config)
        self.drafter.load_model(None)
        self.input_batch = SimpleNamespace(
            req_ids=["one"],
            num_prompt_tokens=np.array([4, 0], np.int32),
            num_tokens_no_spec=np.array([9, 0], np.int32),
            token_ids_cpu=np.zeros((2, 64), np.int32),
        )
        self.input_batch.token_ids_cpu[0, :9] = [1, 2, 3, 4, 5, 6, 1, 2, 3]

    def propose_draft_token_ids(self, scheduler_output: Any, sampled_token_ids: Any) -> Any:
        batch = self.input_batch
        return self.drafter.propose(
            sampled_token_ids, batch.num_tokens_no_spec, batch.token_ids_cpu, slot_mappings=None
        )

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        return spec_decode_metadata


def output(**fields: Any) -> SimpleNamespace:
    given = {
        "scheduled_new_reqs": [],
        "finished_req_ids": set(),
        "scheduled_spec_decode_tokens": {},
        "total_num_scheduled_tokens": 1,
    }
    return SimpleNamespace(**{**given, **fields})


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a runner of a configuration, with our seam over it."""
    monkeypatch.setattr(gpu_model_runner, "GPUModelRunner", Runner)
    originals = Runner.propose_draft_token_ids, Runner._sample
    spec_proposer.install()
    spec_proposer.install()  # every process may, several times
    yield Runner
    Runner.propose_draft_token_ids, Runner._sample = originals  # type: ignore[method-assign]


def test_the_runners_step_reaches_the_proposer(runner: Any) -> None:
    made = runner(config_of())
    ((*draft,),) = made.propose_draft_token_ids(output(), [[3]])
    assert draft[:2] == [4, 5]
    counts = made.drafter.facts()
    assert counts["steps"] == 1
    made.propose_draft_token_ids(output(scheduled_spec_decode_tokens={"one": [4, 5]}), [[4, 9]])
    found = made.drafter.facts()
    assert (found["drafted"]["ngram"], found["accepted"]["ngram"]) == (2, 1)


def test_a_step_without_drafts_is_sampled_as_without_a_proposer(runner: Any) -> None:
    made = runner(config_of())
    none, some = SimpleNamespace(max_spec_len=0), SimpleNamespace(max_spec_len=2)
    assert [made._sample(None, drafted) for drafted in (None, none, some)] == [None, None, some]
    made.drafter = SimpleNamespace()  # of another method
    assert made._sample(None, none) is none


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_drafted_tokens_have_their_requests_temperature_and_top_k(dtype: torch.dtype) -> None:
    spec_sampling.mend()
    values, ends = torch.tensor([7, 0, 3, 5], dtype=dtype), torch.tensor([2, 3, 3, 6])
    found = rejection_sampler.expand_batch_to_tokens(
        values, ends.int(), 6, replace_from=0, replace_to=1
    )
    assert (found.dtype, found.tolist()) == (dtype, [7, 7, 1, 5, 5, 5])


def test_without_the_seam_nothing_is_drafted() -> None:
    made = Runner(config_of())
    assert made.propose_draft_token_ids(output(), [[3]]) == [[]]


@pytest.mark.parametrize(
    ("choice", "names"),
    [(Choice.BEST, {"ngram", "suffix"}), (Choice.NGRAM, {"ngram"}), (Choice.SUFFIX, {"suffix"})],
)
def test_the_chosen_drafters_are_asked(choice: Choice, names: set[str]) -> None:
    proposer = create_custom_proposer(config_of(choice))
    assert set(proposer.facts()["drafts"]) == names
    assert plugin.worker_facts(None) == proposer.facts()


def test_a_new_requests_salt_reaches_the_worker() -> None:
    spec_proposer.install()
    init_none_hash(sha256)
    salted = request("salted")
    salted.cache_salt = "tenant"
    made = [NewRequestData.from_request(one, ([1],)) for one in (salted, request("plain"))]
    assert [getattr(one, SALT) for one in made] == ["tenant", None]


def seen(config: Any, **request_fields: Any) -> Request:
    proposer = create_custom_proposer(config)
    given = {
        "req_id": "one",
        "sampling_params": None,
        "lora_request": None,
        "num_computed_tokens": 0,
        SALT: "a",
    }
    one = SimpleNamespace(**{**given, **request_fields})
    if request_fields.get(SALT) is Ellipsis:
        delattr(one, SALT)
    batch = SimpleNamespace(req_ids=["one"], num_prompt_tokens=np.array([4]))
    proposer.xllm_see(output(scheduled_new_reqs=[one]), batch)
    found: Request = proposer._step.new["one"]
    return found


def test_tenants_are_told_apart_by_salt_and_adapter() -> None:
    config = config_of()
    adapter = SimpleNamespace(lora_int_id=3)
    found = {
        seen(config, **fields).tenant
        for fields in ({}, {SALT: "b"}, {SALT: None}, {"lora_request": adapter})
    }
    assert len(found) == 4
    assert seen(config, **{SALT: ...}).tenant is None


def test_the_budget_is_ones_own_the_setting_or_none() -> None:
    offline, strict = (
        SimpleNamespace(extra_args=args)
        for args in ({"xllm_class": "offline"}, {"xllm_tpot_ms": 30})
    )
    assert seen(config_of()).tpot_ms == math.inf
    assert seen(config_of(tpot_ms=50.0, scheduler=True)).tpot_ms == 50.0
    owed = config_of(scheduler=True)
    assert seen(owed).tpot_ms == SchedulerSection().tpot_ms
    assert seen(owed, sampling_params=strict).tpot_ms == 30.0
    assert seen(owed, sampling_params=offline).tpot_ms == math.inf


def arguments(**fields: Any) -> SimpleNamespace:
    given = {
        "speculative_config": None,
        "async_scheduling": None,
        "pipeline_parallel_size": 1,
        "enable_lora": False,
        "max_num_seqs": None,
        "max_num_batched_tokens": None,
        "data_parallel_size": 1,
    }
    return SimpleNamespace(**{**given, **fields})


NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("fields", "mode", "reason"),
    [
        ({"speculative_config": NGRAM}, Mode.AUTO, "--speculative-config with ngram is kept"),
        ({"speculative_config": {"method": "mtp"}}, Mode.ON, "with mtp is kept"),
        ({"async_scheduling": True}, Mode.ON, "--async-scheduling is kept"),
        ({"pipeline_parallel_size": 2}, Mode.AUTO, "pipeline stages"),
        ({"enable_lora": True, "max_num_batched_tokens": 4096}, Mode.AUTO, "with --enable-lora"),
    ],
)
def test_it_stands_back_with_a_reason(fields: Any, mode: Mode, reason: str) -> None:
    with pytest.raises(NotAvailableError, match=reason):
        plugin.prepare(arguments(**fields), SpecDecodeSection(mode=mode))


def test_it_stands_back_where_asynchronous_scheduling_would_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(NotAvailableError, match="give up asynchronous scheduling"):
        plugin.prepare(arguments(), SpecDecodeSection())
    assert plugin.prepare(arguments(), SpecDecodeSection(mode=Mode.ON))


@pytest.mark.parametrize(
    ("fields", "section", "choice", "most"),
    [
        ({}, SpecDecodeSection(), Choice.BEST, 16),
        ({}, SpecDecodeSection(drafter=Choice.SUFFIX, most_tokens=5), Choice.SUFFIX, 5),
        ({"speculative_config": NGRAM}, SpecDecodeSection(mode=Mode.ON), Choice.NGRAM, 3),
        (
            {"enable_lora": True, "max_num_batched_tokens": 4096, "max_num_seqs": 64},
            SpecDecodeSection(),
            Choice.BEST,
            16,
        ),
    ],
)
def test_vllm_is_given_our_proposer(
    fields: Any, section: SpecDecodeSection, choice: Choice, most: int
) -> None:
    assert plugin.prepare(arguments(**fields), section) == {
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSERS[choice],
            "num_speculative_tokens": most,
        }
    }


def test_it_attaches_where_vllm_was_built_with_it() -> None:
    config = config_of()
    attachment = Attachment(arguments(), config, SpecDecodeSection())
    assert plugin.attach(attachment) == "vllm.v1.spec_decode.custom_class_proposer"
    config.speculative_config = None
    with pytest.raises(NotAvailableError, match="without our proposer"):
        plugin.attach(attachment)


@CPU
def test_sampled_tokens_follow_the_models_distribution() -> None:
    """50,000 tokens of a chain of 8: chi-squared with 56 degrees of freedom is above 110 once in
    50,000 times by chance; a bias of 2 % in each row's largest share would make it about 120.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "tests.contract.sampled", "50000", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["accepted"] > 5_000
    counts = np.array(found["counts"])
    logits = 1.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(7))
    expected = torch.softmax(logits, -1).numpy() * counts.sum(1, keepdims=True)
    assert ((counts - expected) ** 2 / expected).sum() < 110.0
