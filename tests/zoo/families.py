"""A tiny model of each family: the real architecture with few and small layers, random weights.

Weights are drawn wide enough that what a token says depends on all before it: with vLLM's own dummy
weights it hardly does, and a wrong KV block would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS = 1024
_DENSE: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": _WORDS,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MOE: Mapping[str, Any] = {
    **_DENSE,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_MLA: Mapping[str, Any] = {
    **{k: v for k, v in _DENSE.items() if k != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
_IMAGES = {
    "vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6,
}  # fmt: skip


def _vl(**text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    return {
        "text_config": {**_DENSE, "rope_parameters": rope, **text},
        "vision_config": _VISION,
        **_IMAGES,
    }


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: as users know it.
        kind: transformers' name of its architecture.
        config: what differs from that architecture's defaults.
        stands_for: what about it could matter to us.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    stands_for: str

    @property
    def images(self) -> bool:
        """Whether it takes images."""
        return "vision_config" in self.config or self.kind.startswith("minicpmv")


FAMILIES = (
    Family("Qwen2, Qwen2.5, R1-Distill-Qwen", "qwen2", _DENSE, "bias in attention"),
    Family("QwQ", "qwen2", {**_DENSE, "num_key_value_heads": 1}, "one KV head for many"),
    Family("Qwen3", "qwen3", _DENSE, "norms within attention"),
    Family("Qwen3-MoE", "qwen3_moe", _MOE, "experts"),
    Family("Llama 2", "llama", {**_DENSE, "num_key_value_heads": 4}, "a KV head for each"),
    Family("Llama 3", "llama", {**_DENSE, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}}, "scaled positions"),
    Family("DeepSeek V3, R1", "deepseek_v3", _MLA, "MLA, groups of experts"),
    Family("Kimi-K2", "deepseek_v3", {**_MLA, "n_group": 1, "first_k_dense_replace": 2},
           "MLA, experts in one group"),
    Family("Qwen2.5-VL", "qwen2_5_vl", _vl(), "positions of images, text alone here"),
    Family("MiMo-VL", "qwen2_5_vl", _vl(num_hidden_layers=4, num_key_value_heads=1),
           "Qwen2.5-VL's architecture, text alone here"),
    Family("MiniCPM-V 4.6", "minicpmv4_6", {
        "text_config": {"model_type": "qwen3_5_text", **_DENSE,
                        "layer_types": ["linear_attention", "full_attention"] * 2,
                        "num_hidden_layers": 4}}, "linear attention beside attention; text alone"),
    Family("Gemma 3", "gemma3_text", {**_DENSE, "sliding_window": 64, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}, "sliding windows"),
    Family("Granite 4", "granitemoehybrid", {**_DENSE, "layer_types": [
        "mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 32,
        "mamba_n_groups": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64}, "Mamba beside attention"),
)  # fmt: skip


def written(family: Family, folder: Path) -> Path:
    """The model in a folder, as transformers writes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    target = folder / family.name.replace(" ", "-").replace(",", "").replace(".", "-")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **family.config)
    images = getattr(config, "vision_config", None) is not None
    made = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_config(config)
    made.to(torch.float32).save_pretrained(target)
    return target
