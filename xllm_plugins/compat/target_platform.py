"""Seam: vLLM's configuration as it would be on a machine with other hardware than this one.

vLLM shapes its configuration by the platform that it finds. :func:`target_platform` lets it find
another one while a simulation builds its configuration; :func:`kv_cache_config` then sizes the KV
cache as an engine on that platform would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xllm_plugins.compat import Target
from xllm_plugins.errors import NotAvailableError

WHY = "vLLM has no way to ask what its configuration would be on another platform."
WITHOUT = "xllm simulate ends, and says so."
HOLDS_FOR = ">=0.32,<0.33"
_PLATFORM = "vllm.platforms.interface:Platform"
_KV = "vllm.v1.core.kv_cache_utils"
SEAM = (
    Target(f"{_PLATFORM}.check_and_update_config", ("vllm_config",)),
    Target(f"{_PLATFORM}.get_device_capability", ("device_id",)),
    Target(f"{_PLATFORM}.get_device_total_memory", ("device_id",)),
    Target("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self", "usage_context")),
    Target(f"{_KV}:get_kv_cache_configs", ("vllm_config", "kv_cache_specs", "available_memory")),
    Target(f"{_KV}:generate_scheduler_kv_cache_config", ("kv_cache_configs",)),
    Target(f"{_KV}:resolve_kv_cache_block_sizes", ("kv_cache_config", "vllm_config")),
    Target("vllm.v1.kv_cache_interface:FullAttentionSpec"),
    Target("vllm.v1.kv_cache_interface:MLAAttentionSpec"),
    Target("vllm.v1.kv_cache_interface:SlidingWindowSpec"),
    Target("vllm.v1.attention.backends.utils:resolve_kv_cache_layout"),
)
_MANY = 1 << 10  # GPUs; a simulated instance may have as many as it likes
_LAYOUT = "LBNHC"  # what FlashAttention prefers; only the size of a block matters here


@contextmanager
def target_platform(name: str, memory_bytes: int, capability: tuple[int, int]) -> Iterator[None]:
    """Let vLLM believe that it runs on this NVIDIA GPU.

    The platform object is one for the whole process and has been imported by value everywhere, so
    its class is exchanged, and put back at the end.
    """
    # What would be imported while the class is exchanged would look for CUDA's kernels.
    import vllm.model_executor.layers.quantization.online.base
    import vllm.model_executor.model_loader  # noqa: F401
    from vllm.platforms import current_platform

    own = type(current_platform)
    current_platform.__class__ = _platform(name, memory_bytes, capability)
    try:
        yield
    finally:
        current_platform.__class__ = own


def _platform(name: str, memory_bytes: int, capability: tuple[int, int]) -> type:
    import torch
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class TargetPlatform(Platform):  # type: ignore[misc]
        """vLLM's CUDA platform as far as a configuration depends on it."""

        _enum = PlatformEnum.CUDA
        device_name = "cuda"
        device_type = "cuda"
        dispatch_key = "CUDA"
        dist_backend = "nccl"

        @property
        def supported_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return memory_bytes

        @classmethod
        def device_count(cls) -> int:
            return _MANY

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            if vllm_config.parallel_config.worker_cls == "auto":
                vllm_config.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"

        @classmethod
        def import_kernels(cls) -> None:
            """There are none here."""

        @classmethod
        def import_ir_kernels(cls) -> None:
            """There are none here."""

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
            return IrOpPriorityConfig.with_default(["native"])

        @classmethod
        def support_hybrid_kv_cache(cls) -> bool:
            return True

        @classmethod
        def support_static_graph_mode(cls) -> bool:
            return True

        @classmethod
        def supports_fp8(cls) -> bool:
            return bool(capability >= (8, 9))

        @classmethod
        def use_custom_allreduce(cls) -> bool:
            return True

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return True

    return TargetPlatform


def kv_cache_config(vllm_config: Any, memory_bytes: int) -> Any:
    """The KV cache of one instance, as vLLM divides ``memory_bytes`` of each of its GPUs.

    Raises:
        NotAvailableError: the model has layers whose state is not known here.
        ValueError: the memory does not hold one request of the longest length.
    """
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils

    specs = _specs(vllm_config)
    resolve_kv_cache_layout(vllm_config, [[_LAYOUT]], specs.values())
    configs = kv_cache_utils.get_kv_cache_configs(vllm_config, [specs], [memory_bytes])
    vllm_config.cache_config.num_gpu_blocks = configs[0].num_blocks
    return kv_cache_utils.generate_scheduler_kv_cache_config(configs)


def block_sizes(vllm_config: Any, config: Any) -> tuple[int, int]:
    """The scheduler's block size and that of block hashes, in tokens."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    scheduler, hashes = resolve_kv_cache_block_sizes(config, vllm_config)
    return int(scheduler), int(hashes)


def _specs(vllm_config: Any) -> dict[str, Any]:
    """What each attention layer keeps of a token on one GPU; a worker asks its layers for it."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    model, cache = vllm_config.model_config, vllm_config.cache_config
    if model.is_hybrid or model.is_attention_free:
        raise NotAvailableError(f"{model.model} keeps a state that is not attention KV")
    common = {
        "block_size": cache.block_size,
        "num_kv_heads": model.get_num_kv_heads(vllm_config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
    }
    text, specs = model.hf_text_config, {}
    kinds = getattr(text, "layer_types", None) or []
    for index in range(model.get_num_layers(vllm_config.parallel_config)):
        kind = kinds[index] if index < len(kinds) else "full_attention"
        if model.use_mla:
            spec: Any = MLAAttentionSpec(**common)
        elif kind == "sliding_attention":
            spec = SlidingWindowSpec(**common, sliding_window=model.get_sliding_window())
        elif kind == "full_attention":
            spec = FullAttentionSpec(**common)
        else:
            raise NotAvailableError(f"{model.model} has layers of type {kind}")
        specs[f"model.layers.{index}.self_attn.attn"] = spec
    return specs
