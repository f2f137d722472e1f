"""KV transfers between instances, which share their links."""

from __future__ import annotations

from collections import defaultdict

from xllm_scheduler.simulate.hardware import Link


class Network:
    """Each instance has one link; a transfer uses the sender's and the receiver's.

    Transfers queue at both: one starts when the sides that it needs are free. So the bytes of
    concurrent transfers share a link, first come, first served.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_s: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.bytes_moved = 0

    def transfer(self, sender: str, receiver: str, size_bytes: int, now_s: float) -> float:
        """Start a transfer; when it will be complete, in seconds of virtual time."""
        out, into = (sender, "out"), (receiver, "in")
        start_s = max(now_s, self._free_s[out], self._free_s[into])
        end_s = start_s + size_bytes / self._link.bytes_s
        self._free_s[out] = self._free_s[into] = end_s
        self.bytes_moved += size_bytes
        return end_s + self._link.latency_ms / 1e3

    def forget(self, instance: str) -> None:
        """Drop what is queued at an instance that has failed."""
        for side in ("out", "in"):
            self._free_s.pop((instance, side), None)
