"""GPUs and links that a simulation knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from xllm_plugins.errors import ConfigError

_GIB = 1 << 30
_T = TypeVar("_T")


@dataclass(frozen=True)
class Gpu:
    """What vLLM's configuration depends on.

    Attributes:
        name: as its driver says it.
        memory_bytes: as CUDA reports it, which is less than is printed on the box.
        capability: CUDA's compute capability.
        mla_block_tokens: the KV block size that vLLM prefers for MLA models there.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    mla_block_tokens: int = 16


@dataclass(frozen=True)
class Link:
    """How KV moves from one instance to another.

    Attributes:
        bytes_s: bandwidth of one instance's side of it, in bytes per second.
        latency_ms: what each transfer takes beside.
    """

    bytes_s: float
    latency_ms: float


CPU = "cpu"
GPUS: Mapping[str, Gpu] = {
    CPU: Gpu("CPU", 0, (0, 0)),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", int(79.2 * _GIB), (8, 0)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", int(79.1 * _GIB), (9, 0)),
    "h200": Gpu("NVIDIA H200", int(139.8 * _GIB), (9, 0)),
    "b200": Gpu("NVIDIA B200", int(178.4 * _GIB), (10, 0), mla_block_tokens=32),
}
"""By the name that a profile and ``--gpu`` use; ``cpu`` is the machine itself."""

# Bandwidths that transfers reach, not those on the box, and set-up times, as llm-d-inference-sim
# gives them for its links.
LINKS: Mapping[str, Link] = {
    "nvlink": Link(600e9, 0.3),
    "rdma-400g": Link(40e9, 1.0),
    "ethernet-25g": Link(2.5e9, 5.0),
    "tcp": Link(1.0e9, 10.0),
}
"""By the name that ``--link`` uses."""


def named(table: Mapping[str, _T], name: str, option: str) -> _T:
    """The entry of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in table:
        raise ConfigError(f"{option} is {name!r}; allowed are {', '.join(sorted(table))}.")
    return table[name]
