"""Virtual time."""

from __future__ import annotations

START_S = 1000.0  # not 0, which code may take for "never"


class VirtualClock:
    """Stands in for the module ``time``: it stands still until it is set.

    Attributes:
        now_s: the virtual time.
    """

    def __init__(self) -> None:
        self.now_s = START_S

    def monotonic(self) -> float:
        """Like ``time.monotonic``."""
        return self.now_s

    def time(self) -> float:
        """Like ``time.time``."""
        return self.now_s
