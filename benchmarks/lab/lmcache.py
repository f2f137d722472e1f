"""LMCache to compare with, from an environment of its own: what it wants clashes with vLLM's.

    pip install --target FOLDER --no-deps lmcache==0.5.6 sortedcontainers aiofile aiofiles caio nvtx
    pip install --target FOLDER --no-deps awscrt opentelemetry-exporter-prometheus==0.60b1

Its server process, which vLLM's connector starts, keeps KV in shared host memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.lab.server import free_port, own_modules

_MODULE = "lmcache.integration.vllm.lmcache_mp_connector"


def lmcache_env(folder: Path) -> dict[str, str]:
    """Environment of a server that finds LMCache in this folder."""
    path = own_modules()["PYTHONPATH"]
    return {"PYTHONPATH": os.pathsep.join([path, str(folder)]), "LMCACHE_TRACK_USAGE": "false"}


def lmcache_args(host_gib: float, chunk_tokens: int) -> list[str]:
    """Options of ``vllm serve`` with so much host memory, in chunks of so many tokens."""
    server = (
        f"--l1-size-gb {host_gib} --eviction-policy LRU --chunk-size {chunk_tokens} "
        f"--http-port {free_port()} --supported-transfer-mode auto"
    )
    extra = {
        "lmcache.mp.host": "tcp://localhost",
        "lmcache.mp.port": free_port(),
        "lmcache.mp.autostart": True,
        "lmcache.mp.autostart.server_args": server,
    }
    config = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": _MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return ["--kv-transfer-config", json.dumps(config)]
