"""The mean of bounded numbers from bets on it: an interval that holds at every moment, whatever is drawn when.

Someone who doubts that the mean is r bets that the next number lies elsewhere. If the mean is r, no way of betting is
expected to win, so a capital that began at 1 ever reaches 2 / α with probability at most α / 2 (Ville 1939). The
interval is the set of all r against which nobody has won that much. It holds for any number of draws at once, so that
one may stop whenever it is narrow, and for draws that are chosen by what was seen before: whatever the next number is
bounded by, and what is bet on it, must only be fixed before it is drawn (Waudby-Smith and Ramdas 2024, sections 4.1 and
4.2, https://doi.org/10.1093/jrsssb/qkad009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flipproof.campaigns.statistics import Interval

FloatArray = NDArray[np.float64]

_MOST = 0.999
"""Of a capital, the part that a single number can lose."""


class Bets:
    """Numbers seen so far, and the capitals of those who bet against the candidates for their mean.

    With z the number drawn, l ≤ z ≤ h known before, and λ the stake, the capital of who says "it is less than r" is
    multiplied by 1 − min(λ, 0.999/(h − r)) (z − r), and that of who says "it is more" by 1 + min(λ', 0.999/(r − l))
    (z − r). Neither is ever negative, and both are expected to stay as they are if the mean is r. The first grows with
    r and the second falls, so each end of the interval is one number. Several bettors share a capital that began at 1
    in equal parts: what all of them have together is expected to stay as it is, too, and is at least the part that the
    best of them began with times what that one made of it.

    Args:
        low: the least the mean can be.
        high: the most.
        bettors: how many there are on each side.

    Example:
        >>> bets = Bets(0.0, 1.0)
        >>> bets.add([0.0] * 200, within=(0.0, 1.0), stakes=[(1.0, 1.0)])
        >>> [round(end, 4) for end in bets.interval(0.95)]
        [0.0, 0.0186]
    """

    def __init__(self, low: float, high: float, bettors: int = 1) -> None:
        self._low, self._high, self._bettors = low, high, bettors
        # value, low, high, how often that was drawn, and the stakes of each bettor
        self._kept: FloatArray = np.empty((4 + 2 * bettors, 1024))
        self._rows = self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, values: ArrayLike, *, within: Interval, stakes: Sequence[tuple[float, float]]) -> None:
        """More numbers.

        Args:
            values: that were drawn.
            within: what bounds them, fixed before they were drawn.
            stakes: of each bettor, λ if the mean is said to be less, λ' if it is said to be more; fixed before, too.
        """
        new, times = np.unique(np.asarray(values, np.float64), return_counts=True)
        end = self._rows + new.size
        if end > self._kept.shape[1]:
            more = np.empty((len(self._kept), 2 * end))
            more[:, : self._rows] = self._kept[:, : self._rows]
            self._kept = more
        here = self._kept[:, self._rows : end]
        here[0], here[1:3], here[3], here[4:] = new, np.array(within)[:, None], times, np.array(stakes).reshape(-1, 1)
        self._rows = end
        self._count += int(times.sum())

    @property
    def mean(self) -> float:
        """Of the numbers; unbiased for a number of draws that was fixed before."""
        values, times = self._kept[0, : self._rows], self._kept[3, : self._rows]
        return float(values @ times) / self._count if self._count else float("nan")

    @property
    def latest(self) -> tuple[FloatArray, FloatArray]:
        """The last two thirds of the numbers, and how often each was drawn."""
        values, times = self._kept[0, : self._rows], self._kept[3, : self._rows]
        first = int(np.searchsorted(np.cumsum(times), self._count / 3, side="right"))
        return values[first:], times[first:]

    def interval(self, confidence: float) -> Interval:
        """All means against which no capital has reached 2 / (1 − confidence)."""
        if not self._count:
            return self._low, self._high
        enough = log(2 / (1 - confidence))
        values, low, high, times, *sides = self._kept[:, : self._rows]
        less, more = np.array(sides[::2]), np.array(sides[1::2])

        def against_high(r: float) -> float:
            room = high - r
            stake = np.minimum(less, np.divide(_MOST, room, out=np.full_like(room, np.inf), where=room > 0))
            return _together(np.log1p(-stake * (values - r)) @ times)

        def against_low(r: float) -> float:
            room = r - low
            stake = np.minimum(more, np.divide(_MOST, room, out=np.full_like(room, np.inf), where=room > 0))
            return _together(np.log1p(stake * (values - r)) @ times)

        middle = min(max(self.mean, self._low), self._high)
        low = _edge(against_low, middle, self._low, self._high, enough)
        high = _edge(against_high, middle, self._high, self._low, enough)
        return min(low, high), max(low, high)


def _together(logarithms: FloatArray) -> float:
    """Logarithm of the mean of capitals, given theirs."""
    return float(np.logaddexp.reduce(logarithms)) - log(len(logarithms))


def _edge(against: Callable[[float], float], middle: float, outer: float, other: float, enough: float) -> float:
    """The candidate from which on, towards `outer`, a capital is enough; `outer` if it nowhere is."""
    if against(outer) < enough:
        return outer
    inside, outside = (middle, outer) if against(middle) < enough else (other, middle)
    for _ in range(40):
        candidate = (inside + outside) / 2
        if against(candidate) < enough:
            inside = candidate
        else:
            outside = candidate
    return outside
