"""An engine's own index of what it holds, so that it can tell a router that was not there.

vLLM's events are the only place where blocks, their tokens and their tiers stand together, and its
replay keeps the last batches alone. So they are followed from the first one on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from xllm_kv.index import KvIndex
from xllm_kv.snapshot import Snapshot

MOST_BLOCKS = 1_000_000  # about 0.3 kB each
_OWN = "own"
logger = logging.getLogger("vllm.xllm_kv")


class Ledger:
    """Stands before an engine's publisher of events and follows what it publishes.

    Args:
        publisher: vLLM's; it has all that this class has not.
        model: the name under which requests ask for the model.
        block_tokens: tokens of a block.
        groups: the KV cache groups with full attention.
        most_blocks: how many are remembered; beyond them the oldest are forgotten.
    """

    def __init__(
        self,
        publisher: Any,
        model: str,
        block_tokens: int,
        groups: Collection[int],
        most_blocks: int = MOST_BLOCKS,
    ) -> None:
        self._publisher, self._model, self._block_tokens = publisher, model, block_tokens
        self._index: KvIndex | None = KvIndex(most_blocks)
        self._index.add(_OWN, model, block_tokens, groups)
        self._published = 0  # which is the number of the next batch

    def publish(self, batch: Any) -> None:
        """Publish a batch of events and follow it."""
        self._publisher.publish(batch)
        self._published += 1
        if self._index is None:
            return
        try:
            self._index.apply(_OWN, batch.events)
        except Exception:
            logger.exception("KV events cannot be followed; routers get no snapshots from now on")
            self._index = None

    def snapshot(self) -> bytes | None:
        """What the engine holds now, as :class:`Snapshot` on the wire; None if that is unknown."""
        if self._index is None:
            return None
        held = self._index.held(_OWN)
        return Snapshot(self._model, self._block_tokens, self._published, held).wire()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)
