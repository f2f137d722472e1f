"""Configurations as vLLM's command line makes them on vllm-ascend's platform."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

from benchmarks.lab.engine import build_on

MAX_LEN = 512
EXPERTS = 16
_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": MAX_LEN,
}


def configured(
    folder: Path, *, role: str = "", additional: Mapping[str, Any] | None = None, **arguments: Any
) -> Any:
    """What ``EngineArgs`` make of a small mixture of experts, our features attached.

    Args:
        folder: for the model's configuration.
        role: in KV transfer, over a connector that has nobody to talk to.
        additional: ``--additional-config``.
        arguments: others of ``EngineArgs``.
    """
    (folder / "config.json").write_text(json.dumps(_MOE), encoding="utf-8")
    init_none_hash(sha256)
    if role:
        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role=role,
            kv_connector_extra_config={"connectors": []},
        )
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=MAX_LEN,
        additional_config=dict(additional or {}),
        **arguments,
    ).create_engine_config()


def decision(config: Any, feature: str) -> dict[str, Any]:
    """The row of a feature in start-up's table."""
    rows = config.additional_config["xllm_report"]["features"]
    return next(row for row in rows if row["feature"] == feature)


def scheduler_of(config: Any) -> Any:
    """The scheduler that an engine would build."""
    return build_on(config, config.scheduler_config.get_scheduler_cls(), blocks=64)
