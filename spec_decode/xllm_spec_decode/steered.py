"""Steers how far vLLM's own drafting models draft, from its scheduler."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from xllm_plugins.compat.scheduler_levers import idle_experts
from xllm_spec_decode.owed import settings
from xllm_spec_decode.width import BatchWidth, Drafted

logger = logging.getLogger("vllm.xllm_spec_decode")

_STALE_S = 1.0  # a step that took longer waited for something else


class SteeredWidth:
    """Stands where vLLM looks the length of drafts up by the batch's size; told of each step.

    Whatever goes wrong in here leaves the length that the user has set.

    Args:
        vllm_config: vLLM's.
        clock: seconds, monotonic.
    """

    def __init__(self, vllm_config: Any, clock: Callable[[], float] = time.monotonic) -> None:
        _, self._tpot_ms = settings(vllm_config)
        speculative = vllm_config.speculative_config
        self._most = int(speculative.num_speculative_tokens)
        self._method = str(speculative.method)
        self._width = BatchWidth(self._most, idle_experts(vllm_config))
        self._clock = clock
        self._owed_ms: dict[str, float] = {}  # of the requests that are owed a TPOT
        self._last: tuple[float, frozenset[str]] = (-math.inf, frozenset())
        self._counts = dict.fromkeys(
            ("steps", "drafting_steps", "drafts", "drafted", "accepted", "width"), 0
        )
        self._failed = ""

    def __getitem__(self, requests: int) -> int:
        """Asked by vLLM once in a step: the tokens to draft for each of so many requests."""
        if self._failed:
            return self._most
        try:
            budget_ms = min(self._owed_ms.values(), default=math.inf)
            self._counts["width"] = self._width.choose(requests, budget_ms)
        except Exception as error:
            logger.exception("Steering drafts failed and is switched off")
            self._failed = f"{type(error).__name__}: {error}"
            return self._most
        return self._counts["width"]

    def xllm_see(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Called by the seam when a step has been computed."""
        if self._failed:
            return
        try:
            self._observe(scheduler_output, model_runner_output)
        except Exception as error:
            logger.exception("Steering drafts failed and is switched off")
            self._failed = f"{type(error).__name__}: {error}"

    def facts(self) -> dict[str, Any]:
        """What was done and is expected, in plain types."""
        counts = dict(self._counts)
        by_drafter = {
            name: {self._method: counts.pop(name)} for name in ("drafts", "drafted", "accepted")
        }
        return {
            **counts,
            **by_drafter,
            "acceptance": {self._method: float(self._width.chances()[0])},
            "step_ms": self._width.step_facts(),
            "failed": {},
            "stands_back": self._failed,
        }

    def _observe(self, done: Any, said: Any) -> None:
        for request in done.scheduled_new_reqs:
            owed_ms = self._tpot_ms(request)
            if owed_ms < math.inf:
                self._owed_ms[request.req_id] = owed_ms
        for request_id in done.finished_req_ids:
            self._owed_ms.pop(request_id, None)
        (last_s, before), here = self._last, frozenset(done.num_scheduled_tokens)
        if not here:
            return
        now_s = self._clock()
        self._last = (now_s, here)
        drafted = {
            request_id: len(tokens)
            for request_id, tokens in done.scheduled_spec_decode_tokens.items()
            if tokens and request_id in said.req_id_to_index
        }
        rows = [said.sampled_token_ids[said.req_id_to_index[one]] for one in drafted]
        spoken = [place for place, row in enumerate(rows) if len(row)]
        verified = np.array(list(drafted.values()), np.int64)[spoken]
        accepted = np.array([len(rows[place]) - 1 for place in spoken], np.int64)
        alone = done.total_num_scheduled_tokens == len(here) + int(verified.sum())
        follows = here <= before and 0.0 < now_s - last_s < _STALE_S
        cached = done.scheduled_cached_reqs.num_computed_tokens
        step = Drafted(
            requests=len(here),
            verified=verified,
            accepted=accepted,
            width=done.num_spec_tokens_to_schedule,
            context_tokens=sum(cached) if alone else None,
            took_ms=(now_s - last_s) * 1e3 if follows else None,
        )
        self._width.observe(step)
        self._counts["steps"] += 1
        self._counts["drafting_steps"] += bool(spoken)
        self._counts["drafts"] += len(spoken)
        self._counts["drafted"] += int(verified.sum())
        self._counts["accepted"] += int(accepted.sum())
