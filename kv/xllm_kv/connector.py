"""``XLLMConnector``: vLLM's own connectors, together: transfer between instances, and tiers.

It is a MultiConnector, the platform's own where there is one, and carries that name too, which vLLM
asks for wherever it treats a connector of connectors alike. A request's KV is loaded from the first
of them that has it, in the order of the configuration: transfers, which a router asked for, before
tiers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from xllm_kv.plugin import CONNECTOR, TIERS, TIERS_MODULE

_Base: Any = KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
_NICE = 10  # a tenth of a core where computing threads want it too

if TIERS not in KVConnectorFactory._registry:
    # Statistics name the class of a child, which front-end processes look up.
    KVConnectorFactory.register_connector(TIERS, TIERS_MODULE, TIERS)


class XLLMConnector(_Base):  # type: ignore[misc]
    """See the module; its children are built by vLLM from ``connectors``."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with _own_cores():
            super().__init__(vllm_config, role, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Hand the device's KV to every child, and keep the cores that this thread computes on."""
        with _own_cores():
            super().register_kv_caches(kv_caches)


MultiConnector = XLLMConnector


@contextmanager
def _own_cores() -> Iterator[None]:
    """Gives this thread its cores back, and lets new threads yield to it.

    vLLM's NIXL connector on CPUs binds the thread that computes to the machine's last core, where
    several servers would then all compute; and NIXL's progress thread polls without end.
    """
    cores, before = os.sched_getaffinity(0), _threads()
    yield
    if os.sched_getaffinity(0) == cores:
        return
    os.sched_setaffinity(0, cores)
    for thread in _threads() - before - {threading.get_native_id()}:
        os.setpriority(os.PRIO_PROCESS, thread, _NICE)


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}
