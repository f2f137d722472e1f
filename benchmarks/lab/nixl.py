"""How servers on this machine fetch KV from each other: NIXL over shared memory or TCP."""

from __future__ import annotations

from benchmarks.lab.server import free_port

NIXL = {"kv": {"transfer": "nixl"}}  # of --xllm-config


def nixl_env() -> dict[str, str]:
    """Environment of one server; each has a port of its own."""
    return {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_TLS": "tcp,shm,self"}
