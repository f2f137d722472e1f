"""How likely something is to be used soon that was last used a while ago: ages and their ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

BUCKETS = 24  # ages 0, 1 to 2, 3 to 6 and so on, each twice as wide as the last
STARTS = [2.0**k - 1.0 for k in range(BUCKETS + 1)]


def bucket(age: int) -> int:
    """Where an age belongs."""
    return min(BUCKETS - 1, (age + 1).bit_length() - 1)


def indices(hazards: Sequence[float]) -> list[float]:
    """What keeping a block brings for the place that it takes, by the bucket of its age now.

    The largest ratio, over how long it is kept unless used before, of the probability of a use to
    the expected time until then: Gittins' index.
    """
    found = []
    for start in range(BUCKETS):
        width = (STARTS[start + 1] - STARTS[start]) / 2.0  # in the middle of its bucket
        survives, lasted, best = 1.0, 0.0, 0.0
        for later in range(start, BUCKETS):
            hazard = hazards[later]
            left = survives * math.exp(-hazard * width)
            lasted += (survives - left) / hazard if hazard > 0.0 else survives * width
            survives = left
            best = max(best, (1.0 - survives) / lasted)
            width = STARTS[later + 2] - STARTS[later + 1] if later + 2 <= BUCKETS else 0.0
        found.append(best)
    return found
