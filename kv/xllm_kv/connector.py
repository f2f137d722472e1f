"""``XLLMConnector``: vLLM's own connectors, together: transfer between instances, and tiers.

It is a MultiConnector, the platform's own where there is one, and carries that name too, which vLLM
asks for wherever it treats a connector of connectors alike. A request's KV is loaded from the first
of them that has it, in the order of the configuration: transfers, which a router asked for, before
tiers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from xllm_kv.plugin import CONNECTOR, NIXL, TIERS, TIERS_MODULE
from xllm_plugins.compat import inspect_seam, nixl_progress

_Base: Any = KVConnectorFactory.get_connector_class_by_name(CONNECTOR)

if TIERS not in KVConnectorFactory._registry:
    # Statistics name the class of a child, which front-end processes look up.
    KVConnectorFactory.register_connector(TIERS, TIERS_MODULE, TIERS)


class XLLMConnector(_Base):  # type: ignore[misc]
    """See the module; its children are built by vLLM from ``connectors``."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        _calm_nixl(vllm_config.kv_transfer_config.kv_connector_extra_config["connectors"])
        with _own_cores():
            super().__init__(vllm_config, role, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Hand the device's KV to every child, and keep the cores that this thread computes on."""
        with _own_cores():
            super().register_kv_caches(kv_caches)


MultiConnector = XLLMConnector


def _calm_nixl(children: Iterable[Mapping[str, Any]]) -> None:
    """Keep NIXL's thread, where these have one, from the cores that compute."""
    nixl = any(child["kv_connector"] == NIXL for child in children)
    if nixl and inspect_seam("nixl_progress").holds:
        nixl_progress.wait_for_events()


@contextmanager
def _own_cores() -> Iterator[None]:
    """Gives this thread its cores back.

    vLLM's NIXL connector on CPUs binds the thread that computes to the machine's last core, where
    several servers would then all compute.
    """
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)
