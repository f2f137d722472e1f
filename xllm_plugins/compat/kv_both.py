"""Seam: an instance whose connector both sends and fetches KV, so that it can have any role.

vLLM 0.32 warns that NIXL will drop ``kv_both``. Where it is gone an instance does not offer to
move KV, and routers leave roles as they are.
"""

from __future__ import annotations

from xllm_plugins.compat import Target

WHY = "Any instance may prefill or decode, by request, so that roles change without a restart."
WITHOUT = "Instances do not offer to move KV, and routers leave their roles as they are."
HOLDS_FOR = ">=0.23,<0.33"
SEAM = (Target("vllm.config:KVTransferConfig"),)


def check() -> str:
    """Why no instance can do both; empty if it can."""
    from vllm.config import KVTransferConfig

    try:
        made = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both")
    except ValueError as error:
        return f"KVTransferConfig takes no kv_both: {error}"
    both = made.is_kv_producer and made.is_kv_consumer
    return "" if both else "kv_both is not both producer and consumer"
