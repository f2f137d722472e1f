"""Our connector through vLLM's factory, over vllm-ascend's connector of connectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm_ascend.distributed.kv_transfer.ascend_multi_connector import AscendMultiConnector

from tests.ascend.configs import configured, scheduler_of
from tests.contract.engine import Engine, request
from tests.contract.worker import completion
from xllm_kv.plugin import CONNECTOR, MODULE


class Child(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """A connector that has nothing to load and remembers what it was given."""

    registered: dict[str, Any]
    finished: list[str]

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.finished = []

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.registered = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        self.finished.append(request.request_id)
        return False, None


@pytest.fixture
def config(tmp_path: Path) -> Any:
    child = {
        "kv_connector": "Child",
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
    }
    transfer = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": [child]},
    )
    return configured(tmp_path, kv_transfer_config=transfer)


def test_the_factory_finds_ours_over_the_platforms(config: Any) -> None:
    found = KVConnectorFactory.get_connector_class(config.kv_transfer_config)
    assert found.__name__ == "XLLMConnector"
    assert issubclass(found, AscendMultiConnector)


def test_a_worker_hands_its_tuples_of_tensors_to_every_child_as_they_are(config: Any) -> None:
    connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, None)
    caches = {
        "attention": (torch.zeros(4, 128, 1, 8), torch.zeros(4, 128, 1, 8)),
        "latent": (torch.zeros(4, 128, 1, 8), torch.zeros(4, 128, 1, 2)),
        "state": [torch.zeros(4, 3), torch.zeros(4, 8, 2)],
        "single": torch.zeros(4, 128, 1, 8),
    }
    connector.register_kv_caches(caches)
    (child,) = connector._connectors
    assert child.registered is caches


def test_a_scheduler_with_it_serves_a_request_to_its_end(config: Any) -> None:
    scheduler = scheduler_of(config)
    engine = Engine(scheduler)
    engine.add(request("one", [1] * 200, block=scheduler.block_size))
    engine.run()
    assert engine.streams["one"] == completion([1] * 200, 4)
    assert scheduler.connector._connectors[0].finished == ["one"]
