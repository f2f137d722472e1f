"""Seam: vLLM's connector of connectors, which ours extends, and how vLLM finds one outside itself.

A module path in the transfer configuration goes before vLLM's own table of names, so our class
carries the name ``MultiConnector``: wherever vLLM asks for that name it then treats ours alike.
"""

from __future__ import annotations

from xllm_plugins.compat import Target

WHY = "KV transfer and tiers work together behind one connector, which decides where KV goes."
WITHOUT = "xllm.kv is off."
HOLDS_FOR = ">=0.23,<0.33"
_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"
SEAM = (
    Target(
        f"{_V1}.multi_connector:MultiConnector.__init__",
        ("self", "vllm_config", "role", "kv_cache_config"),
    ),
    Target(f"{_V1}.multi_connector:MultiConnector.register_kv_caches", ("self", "kv_caches")),
    Target(f"{_FACTORY}.register_connector", ("name", "module_path", "class_name")),
    Target(f"{_FACTORY}.get_connector_class", ("kv_transfer_config",)),
    Target(f"{_FACTORY}.get_connector_class_by_name", ("connector_name",)),
    Target("vllm.config:KVTransferConfig"),
)
