"""A Hugging Face cache made here: the hub models that vLLM's tests name, small and weightless.

The scheduler reads a model's shape only, so a name gets any model of its kind, text or image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_REVISION = "0" * 40
_IMAGE = 32000
_TEXT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "dtype": "float16",
}
_IMAGES = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "model_type": "blip-2",
    "image_token_index": _IMAGE,
    "num_query_tokens": 576,  # of an image, as in LLaVA 1.5
    "dtype": "float16",
    "text_config": {**_TEXT, "max_position_embeddings": 32768},
    "vision_config": {"model_type": "blip_2_vision_model"},
    "qformer_config": {"model_type": "blip_2_qformer"},
}
_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": _IMAGE}
_WORDS = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, number in _TOKENS.items()
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": _TOKENS, "unk_token": "<unk>"},
}
_IMAGE_FILES: dict[str, Any] = {
    "config.json": _IMAGES,
    "tokenizer.json": _WORDS,
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
    },
    "preprocessor_config.json": {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
    },
    "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": 576},
}
_MODELS: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": {"config.json": _TEXT},
    "facebook/opt-350m": {"config.json": _TEXT},
    "Qwen/Qwen3-0.6B": {"config.json": _TEXT},
    "llava-hf/llava-1.5-7b-hf": _IMAGE_FILES,
    "Qwen/Qwen2.5-VL-3B-Instruct": _IMAGE_FILES,
}


def write_hub(cache: Path) -> None:
    """Fill the directory that HF_HUB_CACHE names."""
    for name, files in _MODELS.items():
        model = cache / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / _REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(_REVISION, encoding="utf-8")
        for file, content in files.items():
            (snapshot / file).write_text(json.dumps(content), encoding="utf-8")
