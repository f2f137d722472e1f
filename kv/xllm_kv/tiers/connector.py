"""vLLM's offloading connector, told what each request lacks and how long that takes to compute."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import make_offload_key

from xllm_kv.prices import Prices
from xllm_kv.report import Room
from xllm_kv.tiers.manager import HOST, GatedManager, Wanted
from xllm_plugins.compat import kv_tiers
from xllm_plugins.latency import StepShape, StepTimeModel
from xllm_plugins.steps import StepClock

_UNKNOWN_MS = 1e3  # a token, until the machine is known: whatever is kept is fetched
_CLASS, _OFFLINE, _PIN = "xllm_class", "offline", "xllm_pin_s"
_MOST_PIN_S = 86_400.0
logger = logging.getLogger("vllm.xllm_kv")


class TiersConnector(OffloadingConnector):  # type: ignore[misc]
    """KV in host memory and on what lies behind it."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_scheduler is None:
            return
        manager = kv_tiers.manager_of(self)
        assert isinstance(manager, GatedManager)
        kv_tiers.tell_extra_keys(self)
        self._manager = manager
        self._model = StepTimeModel()
        self._steps = StepClock(self._model)
        self._step = self._ended = 0
        self._groups = self.connector_scheduler.config.kv_group_configs

    @property
    def prices(self) -> Prices | None:
        """What is known of the tiers, in the scheduler's process."""
        return self._manager.prices if self.connector_scheduler is not None else None

    @property
    def rooms(self) -> dict[str, Room]:
        """How large each tier is, and how full, in the scheduler's process."""
        return self._manager.rooms

    def on_new_request(self, request: Any) -> None:
        """See vLLM's class; also what only slow tiers hold may be fetched while it waits."""
        super().on_new_request(request)
        from_peer = (request.kv_transfer_params or {}).get("do_remote_prefill")
        if self._manager.prefetches and not (from_peer or request.skip_reading_prefix_cache):
            held = kv_tiers.tokens_on_device(self, request)
            self._manager.expect(request.request_id, self._wanted(request, held))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See vLLM's class; decides first what of it is worth fetching."""
        self._manager.plan(request.request_id, self._wanted(request, num_computed_tokens))
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return found

    def _wanted(self, request: Any, computed: int) -> Wanted:
        chains = [
            [
                make_offload_key(block_hash, group.group_idx)
                for block_hash in request.block_hashes[
                    group.hashes_per_chunk - 1 :: group.hashes_per_chunk
                ]
            ]
            for group in self._groups
        ]
        tokens = self._groups[0].tokens_per_chunk
        step_time = self._model.current

        def prefill_ms(count: int) -> float:
            if not step_time.ready:
                return _UNKNOWN_MS * count
            return step_time.added_ms(count, computed)

        said = getattr(request.sampling_params, "extra_args", None) or {}
        return Wanted(
            chains,
            first=computed // tokens,
            chunk_tokens=tokens,
            chunk_bytes=self._manager.chunk_bytes,
            prefill_ms=prefill_ms,
            online=said.get(_CLASS) != _OFFLINE,
            tenant=request.cache_salt or "",
            pin_s=_pin_s(said),
        )

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """See vLLM's class; also a step begins."""
        if scheduler_output.total_num_scheduled_tokens:
            self._step += 1
            self._steps.launched(self._step, _shape(scheduler_output), time.monotonic())
        return super().build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """See vLLM's class; also a step has ended, perhaps with loads from host memory."""
        if self._steps.in_flight:
            self._ended += 1
            self._steps.ended(self._ended, time.monotonic())
        if connector_output.kv_connector_worker_meta is not None:
            loaded, stored = kv_tiers.moved(connector_output)
            if loaded[0]:
                self._manager.prices.ended(HOST, *loaded)
            self._manager.prices.stored(HOST, *stored)
        super().update_connector_output(connector_output)


def _pin_s(said: Mapping[str, Any]) -> float:
    """How long a request asks for its prompt to be kept; 0 where it says nothing sensible."""
    asked = said.get(_PIN, 0.0)
    if isinstance(asked, (int, float)) and math.isfinite(asked) and 0.0 <= asked <= _MOST_PIN_S:
        return float(asked)
    logger.warning(
        "%s is %r, which is ignored; allowed is a number of seconds from 0 to %g", _PIN, asked,
        _MOST_PIN_S,
    )  # fmt: skip
    return 0.0


def _shape(scheduler_output: Any) -> StepShape:
    """What a step computes."""
    shape = StepShape()
    scheduled = scheduler_output.num_scheduled_tokens
    for new in scheduler_output.scheduled_new_reqs:
        shape = shape.with_chunk(scheduled[new.req_id], new.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        shape = shape.with_chunk(scheduled[req_id], computed)
    return shape
