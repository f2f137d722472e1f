"""What two engines must have alike for one to use the KV that the other kept."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

from xllm_plugins.compat import kv_tiers


def identity(spec: Any) -> bytes:
    """All of it, as a digest of 32 bytes; not before the first request, for the hash seed."""
    import torch
    from vllm.platforms import current_platform

    config = spec.config
    parts = (
        config.model, config.cache, config.kv_cache_layout, config.groups, config.parallel,
        config.worker_kv_bytes_per_block, _files(Path(config.model.name)), kv_tiers.hash_seed(),
        # Kernels for CPUs order a block's bytes by what the CPU can do.
        torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else "",
        zlib.__name__,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).digest()


def _files(model: Path) -> list[tuple[str, int, int]]:
    """A local model's files: other weights under the same name are another model."""
    if not model.is_dir():
        return []
    found = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
