"""What load to expect: decayed over windows, its error known, forgotten when traffic changes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xllm_eplb.errors import PlacementError
from xllm_eplb.search import Floats

Bools = NDArray[np.bool_]

_FIRST_ERROR = 0.05  # of a window's shares, relative; until windows can be compared
_LEARN = 0.2  # weight of one window in that error
_FOLLOW = 0.4  # and in what is known of drift


class Forecast:
    """Expected shares of a layer's tokens by expert, from windows of counts.

    A window is one noisy sample: its shares differ from the expected ones by a relative error that
    is learned from how far windows lie apart. The mean of several windows is better by the square
    root of their number. A window that lies much further off is no noise but another traffic: it
    stands alone then.
    """

    def __init__(self, decay: float, change_errors: float) -> None:
        self._decay, self._change = decay, change_errors
        self._counts: Floats | None = None

    @property
    def share(self) -> Floats:
        """``[layers, experts]``, each layer's sum 1, or 0 if it has had no load."""
        assert self._counts is not None
        ahead = _shares(self._counts) + self._drift[:, None] * self._trend
        return _shares(np.maximum(ahead, 0.0))

    @property
    def error(self) -> Floats:
        """``[layers]``: relative standard error of an expert's share, that of drift aside."""
        windows = np.square(self._weights) / self._squares
        trend = _FOLLOW / (2.0 - _FOLLOW) * np.square(self._drift)
        error: Floats = np.sqrt(self._variance * (1.0 / windows + trend))
        return error

    def observe(self, load: Floats) -> None:
        """Take one more window, ``[layers, experts]``; a layer without load is as it was.

        Raises:
            PlacementError: counts that are negative or not finite, another shape than before.
        """
        self._check(load)
        if self._counts is None:
            layers = len(load)
            self._counts = load.astype(float)
            self._variance = np.full(layers, _FIRST_ERROR**2)
            self._weights, self._squares = np.ones(layers), np.ones(layers)
            self._last, self._trend = np.zeros(load.shape), np.zeros(load.shape)
            self._drift = np.zeros(layers)
            self._along, self._around = np.zeros(layers), np.zeros(layers)
            self._compared = np.zeros(layers)
            return
        seen, known = load.sum(1) > 0, self._counts.sum(1) > 0
        expected, found = _shares(self._counts), _shares(load)
        apart, norm = found - expected, np.square(expected).sum(1)
        off = _ratio(np.square(apart).sum(1), norm)
        usual = self._variance + np.square(self.error)
        both = seen & known
        far = both & (off > self._change**2 * usual)
        self._follow(apart, off, norm, both, far)
        drift = self._drift
        # A change counts as the largest error that is none, so that loud noise is learned as well.
        error = np.minimum(off * (1.0 - drift), self._change**2 * usual) * self._variance / usual
        self._compared += both
        learn = np.maximum(_LEARN, 1.0 / (1.0 + self._compared))  # the first guess counts as one
        self._variance += np.where(both, learn * (error - self._variance), 0.0)
        keep = np.where(seen, self._decay * (1.0 - drift), 1.0)
        keep[far | (seen & ~known)] = 0.0
        self._counts = self._counts * keep[:, None] + load
        self._weights = self._weights * keep + seen
        self._squares = self._squares * np.square(keep) + seen

    def _follow(self, apart: Floats, off: Floats, norm: Floats, both: Bools, far: Bools) -> None:
        """Learn where the load drifts to, and which share of the error that is, 0 to 1.

        A mean that lags behind a steady drift errs by as much as the next window lies ahead of it.
        """
        weight = np.where(both, _FOLLOW, 0.0)
        along = _ratio((apart * self._last).sum(1), norm)
        self._along += weight * (along - self._along)
        self._around += weight * (off - self._around)
        self._trend += weight[:, None] * (apart - self._trend)
        self._last = np.where(both[:, None], apart, self._last)
        for learned in (self._last, self._trend, self._along, self._around):
            learned[far] = 0.0
        self._drift = np.clip(_ratio(self._along, self._around), 0.0, 1.0)

    def _check(self, load: Floats) -> None:
        if load.ndim != 2 or not load.size:
            raise PlacementError(f"The load has shape {load.shape}; allowed is [layers, experts].")
        if self._counts is not None and load.shape != self._counts.shape:
            raise PlacementError(
                f"The load has shape {load.shape}; allowed is {self._counts.shape}, as before."
            )
        wrong = np.argwhere(~np.isfinite(load) | (load < 0))
        if len(wrong):
            layer, expert = wrong[0]
            raise PlacementError(
                f"Layer {layer} has load {load[layer, expert]} at expert {expert}; "
                "allowed is a number at least 0."
            )


def _shares(load: Floats) -> Floats:
    return _ratio(load, load.sum(1, keepdims=True))


def _ratio(one: Floats, other: Floats) -> Floats:
    """Their ratio, 0 where there is none."""
    ratio: Floats = np.divide(one, other, out=np.zeros(one.shape), where=other > 0)
    return ratio
