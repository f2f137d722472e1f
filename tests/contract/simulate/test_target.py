"""The configuration is that of the target, not of the CPU that it is made on."""

from __future__ import annotations

import pytest
from vllm.platforms import current_platform

from xllm_plugins import compat
from xllm_plugins.errors import ConfigError, NotAvailableError
from xllm_scheduler.simulate.engine import Engine, EngineSpec, weight_bytes

GIB = 1 << 30


def facts(engine: Engine) -> dict[str, object]:
    config = engine.vllm_config
    return {
        "block": config.cache_config.block_size,
        "prefix": config.cache_config.enable_prefix_caching,
        "chunked": config.scheduler_config.enable_chunked_prefill,
        "async": config.scheduler_config.async_scheduling,
        "budget": config.scheduler_config.max_num_batched_tokens,
        "seqs": config.scheduler_config.max_num_seqs,
        "depth": engine.depth,
    }


# What vLLM 0.32 says of `vllm serve` on H200 and B200.
HOPPER = {
    "block": 16,
    "prefix": True,
    "chunked": True,
    "async": True,
    "budget": 8192,
    "seqs": 1024,
    "depth": 2,
}


def test_on_another_vllm_nothing_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.33.0")
    with pytest.raises(NotAvailableError, match="seam target_platform does not hold: holds for"):
        Engine(EngineSpec("Qwen3-8B", kv_gib=20.0))


def test_a_dense_model_on_h200() -> None:
    engine = Engine(EngineSpec("Qwen/Qwen3-32B", "h200", 4))
    assert facts(engine) == HOPPER
    # 2 x 8 KV heads x 128 x 2 bytes x 64 layers, on four GPUs together.
    assert engine.kv_token_bytes == pytest.approx(2 * 8 * 128 * 2 * 64, rel=1e-3)
    assert weight_bytes(engine.vllm_config) == pytest.approx(32.8e9 * 2, rel=0.01)
    tokens = engine.kv_cache_config.num_blocks * 16
    left = 4 * (0.92 * 139.8 * GIB - 3 * GIB) - 32.8e9 * 2
    assert tokens == pytest.approx(left / engine.kv_token_bytes, rel=0.01)


@pytest.mark.parametrize(("gpu", "block", "budget"), [("h200", 16, 8192), ("b200", 32, 16384)])
def test_a_model_with_latent_attention(gpu: str, block: int, budget: int) -> None:
    engine = Engine(EngineSpec("DeepSeek-V3", gpu, 8, kv_gib=40.0))
    assert facts(engine) == HOPPER | {"block": block, "budget": budget}
    # 512 + 64 values of 2 bytes in 61 layers, the same on each GPU.
    assert engine.kv_token_bytes == pytest.approx(576 * 2 * 61, rel=1e-3)


def test_afterwards_the_platform_is_what_it_was() -> None:
    before = type(current_platform)
    Engine(EngineSpec("Qwen3-8B", kv_gib=20.0))
    assert type(current_platform) is before
    assert current_platform.is_cpu()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (EngineSpec("DeepSeek-V3", "h200", 1), "does not fit on 1 x h200"),
        (EngineSpec("Qwen3-8B", "h300"), "gpu is 'h300'; allowed are"),
        (EngineSpec("Qwen3-8B", vllm={"max_num_sqs": 3}), "vLLM does not take this engine"),
        (EngineSpec("Qwen3-8B", vllm={"max_num_seqs": -3}), "vLLM does not take this engine"),
        (EngineSpec("Qwen3-8B", scheduler="no.such.Class", kv_gib=9.0), "scheduler is 'no.such"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(spec: EngineSpec, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Engine(spec)
    assert said in str(error.value)
