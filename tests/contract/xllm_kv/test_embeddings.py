"""Tiers alone do not make vLLM accept embeddings that nobody has sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig, MultiModalConfig, VllmConfig

from xllm_kv.plugin import refuse_embeddings
from xllm_plugins.compat import vllm_version

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        vllm_version() == "0.23.0",
        reason="vLLM 0.23 leaves embeddings as the user has them",
    ),
]


def config_of(encoder: Any = None, asked: bool = False) -> Any:
    """As much of vLLM's configuration as says whether embeddings are accepted, made by vLLM."""
    transfer = KVTransferConfig(kv_connector="MultiConnector", kv_role="kv_both")
    images = MultiModalConfig(enable_mm_embeds=asked)
    made = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=images),
        kv_transfer_config=transfer,
        ec_transfer_config=encoder,
    )
    VllmConfig._resolve_mm_embedding_inputs(made)
    assert images.enable_mm_embeds
    assert images.allow_missing_mm_embeddings
    return made


@pytest.mark.parametrize("asked", [False, True])
def test_embeddings_are_accepted_where_the_user_asked_for_it_alone(asked: bool) -> None:
    config = config_of(asked=asked)
    refuse_embeddings(config, SimpleNamespace(enable_mm_embeds=asked))
    images = config.model_config.multimodal_config
    assert (images.enable_mm_embeds, images.allow_missing_mm_embeddings) == (asked, False)


def test_who_is_sent_embeddings_by_an_encoder_goes_on_accepting_them() -> None:
    config = config_of(encoder=SimpleNamespace(is_ec_consumer=True))
    refuse_embeddings(config, SimpleNamespace(enable_mm_embeds=False))
    assert config.model_config.multimodal_config.allow_missing_mm_embeddings


def test_a_model_without_images_has_nothing_to_refuse() -> None:
    refuse_embeddings(SimpleNamespace(model_config=SimpleNamespace()), SimpleNamespace())
