"""What lets vLLM's CPU platform divide experts among ranks does what its GPU kernels do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.config.parallel

from xllm_eplb import plugin
from xllm_eplb.config import EplbSection
from xllm_plugins.compat import eplb_cpu, vllm_version

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_version() == "0.23.0", reason="the seam holds for vLLM 0.32"),
]


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the platform back that a test exchanges."""
    module = vllm.config.parallel
    monkeypatch.setattr(module, "current_platform", module.current_platform)


def parallel(eplb_config: Any) -> Any:
    return vllm.config.parallel.ParallelConfig(
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=True,
        eplb_config=eplb_config,
        distributed_executor_backend="mp",
    )


@pytest.mark.usefixtures("platform")
def test_a_configuration_may_have_eplb_on_a_cpu_only_where_that_is_asked_for() -> None:
    config = vllm.config.parallel.EPLBConfig(num_redundant_experts=2, step_interval=7)
    with pytest.raises(ValueError, match="only supported on"):
        parallel(config)
    found = parallel(eplb_cpu.allow(config)).eplb_config
    assert (found.num_redundant_experts, found.step_interval) == (2, 7)
    assert (found.use_async, found.communicator) == (False, "torch_nccl")


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("section", "eplb", "changes"),
    [
        (EplbSection(on_cpu=True), True, {"eplb_config"}),
        (EplbSection(on_cpu=True), False, set()),
        (EplbSection(), True, set()),
    ],
)
def test_arguments_change_only_with_the_setting(
    section: EplbSection, eplb: bool, changes: set[str]
) -> None:
    arguments = SimpleNamespace(enable_eplb=eplb, eplb_config=vllm.config.parallel.EPLBConfig())
    assert set(plugin.prepare(arguments, section)) == changes


def test_tokens_go_to_replicas_as_in_vllms_kernel_and_are_counted() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]], dtype=torch.int32)
    slots = torch.tensor([[0, 4, 5], [1, -1, -1], [2, -1, -1], [3, -1, -1]])
    replicas = torch.tensor([3, 1, 1, 1])
    load = torch.zeros(6, dtype=torch.int32)
    found = eplb_cpu.map_and_record(
        ids, load, slots, replicas, torch.tensor(True), torch.tensor(3, dtype=torch.int32)
    )
    hashed = [(token * 2654435769 & 0xFFFFFFFF) % 3 for token in range(4)]
    assert found[:, 0].tolist() == [[0, 4, 5][replica] for replica in hashed]
    assert found[:, 1].tolist() == [1, 2, 3, 1]
    assert found.dtype == ids.dtype
    assert load.tolist() == torch.bincount(found[:3].flatten(), minlength=6).tolist()
    eplb_cpu.map_and_record(ids, load, slots, replicas, torch.tensor(False))
    assert load.sum() == 6


def test_the_kernel_is_given_this_ranks_experts_and_nothing_of_others() -> None:
    given: dict[str, Any] = {}

    def kernel(topk_weights: Any, topk_ids: Any, expert_map: Any) -> None:
        given.update(weights=topk_weights, ids=topk_ids, experts=expert_map)

    here = torch.tensor([-1, -1, 0, 1])  # slots 2 and 3 are this rank's
    ids = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)
    eplb_cpu._local_experts(kernel)(torch.full((2, 2), 0.5), ids, expert_map=here)
    assert given["ids"].tolist() == [[0, 0], [1, 0]]
    assert given["weights"].tolist() == [[0.0, 0.5], [0.5, 0.0]]
    assert given["experts"] is None
    eplb_cpu._local_experts(kernel)(torch.ones(2, 2), ids, expert_map=None)
    assert given["ids"] is ids


def test_a_runner_that_is_not_meant_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    loaded: list[Any] = []

    def original(self: Any, load_dummy_weights: bool = False) -> None:
        loaded.append(self)

    monkeypatch.setattr(CPUModelRunner, "load_model", original)
    eplb_cpu.install(lambda config: False)
    runner = SimpleNamespace(vllm_config=None)
    CPUModelRunner.load_model(runner)
    assert loaded == [runner]
    assert not hasattr(runner, "eplb_state")
