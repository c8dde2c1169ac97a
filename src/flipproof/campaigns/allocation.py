"""From which strata to draw next, and how to bet on it: guesses that cost draws where they are wrong, never truth.

A space is divided into strata whose shares p are known exactly. Each draw takes stratum s with probability q_s, so that

    z = M + (p_s / q_s) (y − m_s),   M = Σ p_s m_s

has the mean Σ p_s E[y | s] whatever q > 0 and m are (importance sampling with m as control variate: Owen 2013, chapters
8 and 9; Hesterberg 1995). Both may depend on everything drawn before. `Belief` makes m of what was seen, `allocation`
finds the q that needs the fewest draws if the belief is right, `stakes` what `Bets` are to bet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, log

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_RATIOS = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05)
_KAPPAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 1e6)
SPLITS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""How the width of an interval may be shared between its sides."""
_PARTS = 1 / (1 + np.exp(-np.linspace(-11, 6, 26)))
"""Stakes that are compared, as parts of the largest one."""

_MOST = 0.95
"""Of a capital, the part that may be lost on one draw."""

_ALIKE = 3.0
"""How many draws of its own a stratum's group is worth."""

_SURPRISES = 0.1
"""Draws at the far end of the range that nobody expects, among all: who stakes everything on none is ruined by one."""


@dataclass
class Belief:
    """What is thought of a quantity in each stratum: from what was drawn there, in its group, and before anything.

    A stratum's mean is that of its draws and three more at the mean of its group; a group's mean is that of its draws
    and one more at the prior.

    Attributes:
        shares: p of each stratum, (S,).
        groups: numbers of groups of strata that are thought to be alike, (S,).
        prior: mean of each stratum before anything is drawn, in [0, 1], (S,).
        known: Σ p·y over what is known without drawing: with the shares, whose sum may be below 1.
    """

    shares: FloatArray
    groups: IntArray
    prior: FloatArray
    known: float = 0.0
    drawn: FloatArray = field(init=False)
    sums: FloatArray = field(init=False)
    squares: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.drawn, self.sums, self.squares = (np.zeros(self.shares.size) for _ in range(3))

    def learn(self, strata: IntArray, values: FloatArray) -> None:
        """What was drawn: strata and values in [0, 1]."""
        np.add.at(self.drawn, strata, 1)
        np.add.at(self.sums, strata, values)
        np.add.at(self.squares, strata, values**2)

    @property
    def expected(self) -> FloatArray:
        """Of each stratum, what its group says."""
        size = int(self.groups.max()) + 1
        share, drawn, sums, prior = (
            np.bincount(self.groups, x, size) for x in (self.shares, self.drawn, self.sums, self.shares * self.prior)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (sums + np.where(share > 0, prior / share, 0.5)) / (drawn + 1)
        return np.asarray(found[self.groups])

    @property
    def means(self) -> FloatArray:
        """M of each stratum."""
        return (self.sums + _ALIKE * self.expected) / (self.drawn + _ALIKE)

    @property
    def spreads(self) -> FloatArray:
        """Standard deviation of each stratum."""
        means = self.means
        squares = (self.squares + _ALIKE * self.expected) / (self.drawn + _ALIKE)
        return np.sqrt(np.maximum(squares - means**2, 0))

    @property
    def mean(self) -> float:
        """M, with what is known."""
        return self.known + float(self.shares @ self.means)

    def range(self, weights: FloatArray) -> tuple[float, float]:
        """How far z may lie below and above M, given p/q of each stratum."""
        means = self.means
        return float((weights * means).max()), float((weights * (1 - means)).max())

    def kinds(self) -> list[tuple[FloatArray, FloatArray]]:
        """(value of each stratum, its probability): few values that stand for all."""
        expected, total = _ALIKE * self.expected, self.drawn + _ALIKE
        seen = np.maximum(self.drawn, 1)
        mean = self.sums / seen
        spread = np.sqrt(np.maximum(self.squares / seen - mean**2, 0))
        whole = bool((self.squares >= self.sums - 1e-9).all())  # nothing but 0 and 1 was seen
        up, down, part = (np.ones_like(mean), np.zeros_like(mean), mean) if whole else _two_values(mean, spread)
        return [
            (np.clip(up, 0, 1), part * self.drawn / total),
            (np.clip(down, 0, 1), (1 - part) * self.drawn / total),
            (np.ones_like(mean), expected / total),
            (np.zeros_like(mean), (_ALIKE - expected) / total),
        ]


def _two_values(mean: FloatArray, spread: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Two values in [0, 1] of this mean and spread, and the probability of the upper one."""
    variance = np.minimum(spread**2, mean * (1 - mean))
    above = np.minimum(np.sqrt(variance), 1 - mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        below = np.where(above > 0, variance / above, 0.0)
        above = np.where(below > mean, variance / mean, above)
        below = np.minimum(below, mean)
        part = np.where(above + below > 0, below / (above + below), 0.5)
    return mean + above, mean - below, part


def allocation(belief: Belief, margin: float, confidence: float) -> FloatArray:
    """Q of each stratum, such that ± `margin` is reached with about the fewest draws.

    The width of the interval after n draws is about 2 √(2 V L / n) + C L / n, with L = log(2 / (1 − confidence)), V the
    variance of z and C the length of its range (Bernstein). For V alone q ∝ p σ is best (Neyman 1934); for C
    alone, q in proportion to p. A stratum of which nothing was found costs by its range, so both count. The best of
    q ∝ max(p (1 − m), p m / a, b p σ) over a and b is taken.
    """
    shares, means, spreads = belief.shares, belief.means, belief.spreads
    enough = log(2 / (1 - confidence))
    a, b = (part.reshape(-1, 1) for part in np.meshgrid(_RATIOS, _KAPPAS, indexing="ij"))
    q = shares * np.maximum(np.maximum(1 - means, means / a), b * spreads)
    q /= q.sum(axis=1, keepdims=True)
    weights = shares / q
    variance = (shares * weights) @ spreads**2
    length = (weights * means).max(axis=1) + (weights * (1 - means)).max(axis=1)
    root = np.sqrt(2 * variance * enough)
    draws = ((root + np.sqrt(root**2 + 2 * margin * length * enough)) / (2 * margin)) ** 2
    return np.asarray(q[int(draws.argmin())])


def stakes(
    belief: Belief,
    q: FloatArray,
    margin: float,
    splits: Sequence[float] = SPLITS,
    plausible: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """What to bet against higher and against lower means: what lets capitals grow fastest if the belief is right.

    The interval is 2·margin wide when it is narrow enough. How that is shared between its two sides is such that the
    slower of the two capitals grows fastest (Kelly 1956).

    Args:
        belief: of the quantity.
        q: with which strata are drawn.
        margin: half-width that is wanted.
        splits: parts of the width that the upper side may take.
        plausible: the interval so far: against no mean in it is nearly everything staked on one draw.
    """
    weights, means = belief.shares / q, belief.means
    kinds = belief.kinds()
    z = np.concatenate([weights * (value - means) for value, _ in kinds])
    chance = np.concatenate([part * q for _, part in kinds])
    surprise = _SURPRISES / (float(belief.drawn.sum()) + 1)
    return _best(
        z[chance > 0], chance[chance > 0], belief.mean, belief.range(weights), margin, splits, plausible, surprise
    )


def stakes_seen(
    z: FloatArray,
    times: FloatArray,
    belief: Belief,
    q: FloatArray,
    margin: float,
    splits: Sequence[float] = SPLITS,
    plausible: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """The same, if draws go on as the latest ones did, whatever is believed of their strata.

    In a space of many strata with rates of all sizes, what is believed lags behind for thousands of draws. Who stakes
    by that loses, and has to win it back; who looks at z alone does not.

    Args:
        z: the latest draws.
        times: how often each.
        belief: says with q how far z may lie, and no more.
        q: with which strata are drawn next.
        margin: as for `stakes`, and so are
        splits: and
        plausible: the interval so far.
    """
    chance = times / times.sum()
    mean = min(max(float(z @ chance), plausible[0]), plausible[1])
    below, above = belief.range(belief.shares / q)
    within = (mean - belief.mean + below, belief.mean + above - mean)
    return _best(z - mean, chance, mean, within, margin, splits, plausible, _SURPRISES / (float(times.sum()) + 1))


def _best(
    z: FloatArray,
    chance: FloatArray,
    mean: float,
    within: tuple[float, float],
    margin: float,
    splits: Sequence[float],
    plausible: tuple[float, float],
    surprise: float,
) -> tuple[float, float]:
    """Both stakes, for draws that lie so far from their mean with these chances, and at most `within` of it."""
    (below, above), upper = within, np.asarray(splits)
    up, less = _growth(z, chance, 2 * margin * upper, above, 1 - mean, surprise)
    down, more = _growth(-z, chance, 2 * margin * (1 - upper), below, mean, surprise)
    best = int(np.minimum(up, down).argmax())
    low, high = plausible
    return (
        min(float(less[best]), _MOST / max(mean + above - low, 1e-12)),
        min(float(more[best]), _MOST / max(high - mean + below, 1e-12)),
    )


def _growth(
    z: FloatArray, chance: FloatArray, distances: FloatArray, reach: float, room: float, surprise: float
) -> tuple[FloatArray, FloatArray]:
    """How fast capitals against means at these distances grow at best, and by which stakes.

    Args:
        z: distances of draws from M, towards the means that are doubted.
        chance: of them.
        distances: from M to the means that are doubted, (D,).
        reach: how far z may lie on that side.
        room: how far the mean may lie on that side: what lies beyond is ruled out without bets.
        surprise: chance of a draw at the far end, besides.
    """
    aims = np.minimum(distances, reach / 2)
    if reach <= 0:
        return np.full(aims.size, inf), np.zeros(aims.size)
    stake = _PARTS / (reach - aims)[:, None]
    grown = np.log(np.maximum(1 - stake[..., None] * (z - aims[:, None, None]), 1e-12)) @ chance
    grown += surprise * np.log(np.maximum(1 - stake * (reach - aims[:, None]), 1e-12))
    best = grown.argmax(axis=1)
    rows = np.arange(aims.size)
    beyond = distances >= room
    return np.where(beyond, inf, grown[rows, best]), np.where(beyond, 0.0, stake[rows, best])
