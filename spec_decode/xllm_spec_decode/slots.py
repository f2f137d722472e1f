"""Which request has which number, who it belongs to, and what it is owed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xllm_spec_decode.drafters import Ints

_MOST_TENANTS = 1 << 16


class Request(NamedTuple):
    """What is known of a request when it comes.

    Attributes:
        tenant: requests with the same may see what the others said; None for nobody else.
        tpot_ms: that it is owed; infinite for none.
        cached_tokens: of its prompt whose KV was there.
    """

    tenant: Hashable | None
    tpot_ms: float = math.inf
    cached_tokens: int = 0


class Slots:
    """Numbers for requests, kept while they are held back or preempted; the longest absent yields.

    Args:
        count: of slots, at least as many as there are requests in a step.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._slots: dict[str, int] = {}
        self._owners = [""] * count
        self._seen = np.zeros(count, np.int64)  # the last step that a slot's owner was in
        self._steps = 0
        self._tenants: OrderedDict[Hashable, int] = OrderedDict()
        self._next_tenant = 0
        self._tenant = np.zeros(count, np.int64)
        self._tpot_ms = np.full(count, math.inf)
        self._owed = False  # a TPOT to anybody so far

    def take(self, ids: Sequence[str], new: Mapping[str, Request]) -> tuple[Ints, list[int]]:
        """The slots of these requests, and those of them that have another owner than before."""
        for request_id in new:
            self.release(request_id)  # a name may be used again
        self._steps += 1
        found = list(map(self._slots.get, ids))
        if None not in found:
            slots = np.array(found, np.int64)
            self._seen[slots] = self._steps
            return slots, []
        self._seen[[slot for slot in found if slot is not None]] = self._steps
        taken = []
        for place, request_id in enumerate(ids):
            if found[place] is None:
                slot = found[place] = self._free.pop() if self._free else self._longest_absent()
                self._slots[request_id] = slot
                self._owners[slot] = request_id
                self._seen[slot] = self._steps
                self._fill(slot, new.get(request_id, Request(None)))
                taken.append(slot)
        return np.array(found, np.int64), taken

    def release(self, request_id: str) -> None:
        """The request is gone."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def tenants(self, slots: Ints) -> Ints:
        """A number for each tenant, ``[n]``."""
        return self._tenant[slots]

    def least_tpot_ms(self, slots: Ints) -> float:
        """The strictest of these requests' TPOTs, infinite for none."""
        return float(self._tpot_ms[slots].min(initial=math.inf)) if self._owed else math.inf

    def _longest_absent(self) -> int:
        slot = int(self._seen.argmin())
        del self._slots[self._owners[slot]]
        return slot

    def _fill(self, slot: int, request: Request) -> None:
        self._tpot_ms[slot] = request.tpot_ms
        self._owed = self._owed or request.tpot_ms < math.inf
        known = None if request.tenant is None else self._tenants.get(request.tenant)
        if known is None:
            known = self._next_tenant  # never given to another
            self._next_tenant += 1
            if request.tenant is not None:
                self._tenants[request.tenant] = known
                if len(self._tenants) > _MOST_TENANTS:
                    self._tenants.popitem(last=False)
        self._tenant[slot] = known
