"""Random numbers that are a function of (campaign seed, point, trial) alone, fast enough for tiny models.

A NumPy generator object costs more than a trial on a small network; a counter-based stream costs nothing to make:
output i of a stream is the splitmix64 finaliser of ``key + i · 0x9E3779B97F4A7C15`` (Steele, Lea, Flood: Fast
splittable pseudorandom number generators, OOPSLA 2014), and the key is a BLAKE2 hash of what names the trial.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flipproof._kernels import kernel
from flipproof.errors import FaultModelError
from flipproof.spaces.contract import Positions

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31 = (np.uint64(n) for n in (11, 27, 30, 31))


@kernel(inline="always")
def _word(key, counter):  # type: ignore[no-untyped-def]
    """Output `counter` of stream `key`: 64 uniform bits."""
    z = key + counter * _GAMMA
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


def _upper(typing_context, a, b):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), codegen


_upper_half: Any = intrinsic(_upper)
"""The upper 64 bits of a product, one instruction on most machines; the lower ones are plain ``a * b``."""


@kernel(inline="always")
def _draw(key, counter, limit, threshold):  # type: ignore[no-untyped-def]
    """(The counter of the next word that is kept, that word); words × limit with a low half below it are not kept.

    Exactly unbiased: Lemire's multiplication with rejection (Fast random integer generation in an interval, ACM TOMACS
    2019), whose branch is almost never taken.
    """
    counter += np.uint64(1)
    word = _word(key, counter)
    while word * limit < threshold:
        counter += np.uint64(1)
        word = _word(key, counter)
    return counter, word


@kernel()
def _below(signed_key, count_of_words, high, out):  # type: ignore[no-untyped-def]
    """Fill `out` with integers uniform in [0, high). Returns the new counter."""
    key, counter, limit = np.uint64(signed_key), np.uint64(count_of_words), np.uint64(high)
    threshold = (np.uint64(0) - limit) % limit
    for i in range(out.size):
        counter, word = _draw(key, counter, limit, threshold)
        out[i] = np.int64(_upper_half(word, limit))
    return np.int64(counter)


_A_BUCKET = 4
"""Numbers that share a bucket, on average: few enough to be sorted by insertion, and enough for buckets to be cheap."""


@kernel(inline="always")
def _insertion_sort(values, count):  # type: ignore[no-untyped-def]
    for i in range(1, count):
        value, j = values[i], i - 1
        while j >= 0 and values[j] > value:
            values[j + 1] = values[j]
            j -= 1
        values[j + 1] = value


@kernel()
def _sorted_below(key, counter, limit, out):  # type: ignore[no-untyped-def]
    """As `_below`, sorted: numbers ascend with the words that they are made of, so their upper bits name a bucket.

    Words are made twice, to count buckets and to fill them, which takes less time than to keep them.
    """
    threshold = (np.uint64(0) - limit) % limit
    power = 0
    while (_A_BUCKET << power) < out.size:
        power += 1
    start = counter
    if power:
        down = np.uint64(64 - power)
        places = np.zeros((1 << power) + 1, np.int32)
        for _ in range(out.size):
            counter, word = _draw(key, counter, limit, threshold)
            places[np.int64(word >> down) + 1] += 1
        for i in range(1 << power):
            places[i + 1] += places[i]
        counter = start
        for _ in range(out.size):
            counter, word = _draw(key, counter, limit, threshold)
            bucket = np.int64(word >> down)
            out[places[bucket]] = np.int64(_upper_half(word, limit))
            places[bucket] += 1
    else:
        for i in range(out.size):
            counter, word = _draw(key, counter, limit, threshold)
            out[i] = np.int64(_upper_half(word, limit))
    _insertion_sort(out, out.size)
    return counter


@kernel(inline="always")
def _first_of_each(values):  # type: ignore[no-untyped-def]
    """Squeeze repeats out of a sorted array in place; returns how many values are left."""
    kept = 0
    for i in range(values.size):
        if kept == 0 or values[i] != values[kept - 1]:
            values[kept] = values[i]
            kept += 1
    return kept


@kernel(inline="always")
def _merge(values, count, fresh, more):  # type: ignore[no-untyped-def]
    """Put `more` ascending numbers in among `count`, in place, each once; returns how many there are."""
    added = 0
    for i in range(more):  # those that are there already are not merged
        at = np.searchsorted(values[:count], fresh[i])
        if at == count or values[at] != fresh[i]:
            fresh[added] = fresh[i]
            added += 1
    i, j = count - 1, added - 1
    for place in range(count + added - 1, -1, -1):
        if j < 0:
            break
        if i >= 0 and values[i] > fresh[j]:
            values[place] = values[i]
            i -= 1
        else:
            values[place] = fresh[j]
            j -= 1
    return count + added


@kernel()
def _distinct(signed_key, count_of_words, population, out):  # type: ignore[no-untyped-def]
    """Fill `out` with distinct numbers in [0, population), ascending. Returns the new counter."""
    key, counter, limit = np.uint64(signed_key), np.uint64(count_of_words), np.uint64(population)
    counter = _sorted_below(key, counter, limit, out)
    found = _first_of_each(out)
    while found < out.size:  # a few are missing
        fresh = np.empty(out.size - found, np.int64)
        counter = _sorted_below(key, counter, limit, fresh)
        found = _merge(out, found, fresh, _first_of_each(fresh))
    return np.int64(counter)


@kernel()
def _bernoulli(signed_key, count_of_words, probability, population, out):  # type: ignore[no-untyped-def]
    """Positions of successes among `population` independent trials, by geometric gaps. Returns (counter, count).

    Count is −1 if `out` was too small; the caller then starts over from the same counter with more room.
    """
    key, counter = np.uint64(signed_key), np.uint64(count_of_words)
    log_failure = np.log1p(-probability)
    position = np.int64(-1)
    count = 0
    one = np.uint64(1)
    while True:
        counter += one
        uniform = (np.float64(_word(key, counter) >> _11) + 1.0) * 2.0**-53  # in (0, 1]
        gap = np.floor(np.log(uniform) / log_failure)
        if gap >= population - 1 - position:
            return np.int64(counter), count
        position += np.int64(gap) + 1
        if count == out.size:
            return np.int64(counter), -1
        out[count] = position
        count += 1


class TrialGenerator:
    """The random stream of one trial.

    Two trials with the same (seed, point, trial) draw the same numbers wherever and whenever they run; any other two
    draw independent ones. No state is shared, so order and number of workers cannot matter.

    Args:
        seed: the campaign's seed, any int ≥ 0.
        point: names the fault point, by convention the repr of its fault model: a rate keeps its draws when other
            rates join or leave the sweep.
        trial: index of the trial at this point.

    Example:
        >>> TrialGenerator(0, "p", 7).distinct(3, 1000).tolist() == TrialGenerator(0, "p", 7).distinct(3, 1000).tolist()
        True
    """

    def __init__(self, seed: int, point: str, trial: int) -> None:
        if seed < 0 or trial < 0:
            raise FaultModelError(f"seed and trial count from 0, got seed={seed}, trial={trial}")
        name = f"{seed}\x00{point}\x00{trial}".encode()
        # 64 bits as Python's own signed integers, which compiled code takes sooner than NumPy's
        self._key = int.from_bytes(blake2b(name, digest_size=8).digest(), "little", signed=True)
        self._counter = 0

    def below(self, high: int, count: int) -> Positions:
        """`count` independent integers, uniform in [0, high)."""
        out = np.empty(count, np.int64)
        if count:
            self._counter = _below(self._key, self._counter, high, out)
        return out

    def distinct(self, count: int, population: int) -> Positions:
        """A uniformly random `count`-subset of range(population), sorted.

        Draws with replacement, drops repeats and draws again for as many as were dropped: each draw adds at most one
        element, so the set never overshoots, and no element is preferred. Needs no memory of the population's size;
        beyond half of it the complement is drawn instead.
        """
        if not 0 <= count <= population:
            raise FaultModelError(f"cannot draw {count} distinct bits from {population}")
        if count > population // 2:
            left_out = self.distinct(population - count, population)
            keep = np.ones(population, np.bool_)
            keep[left_out] = False
            return np.flatnonzero(keep).astype(np.int64)
        chosen = np.empty(count, np.int64)
        if count:
            self._counter = _distinct(self._key, self._counter, population, chosen)
        return chosen

    def nested(self, count: int, population: int) -> Positions:
        """The first `count` of a random order of range(population), sorted: fewer of one stream are among more of it.

        As `distinct`, of which it is the same set up to half of the population; the complement that is drawn beyond
        would not hold it.
        """
        half = max(1, population // 2)
        if count <= half:
            return self.distinct(count, population)
        first = self.distinct(half, population)
        others = np.ones(population, np.bool_)
        others[first] = False
        rest = np.flatnonzero(others)
        more = rest[self.nested(count - half, rest.size)]
        return np.sort(np.concatenate([first, more])).astype(np.int64)

    def bernoulli(self, probability: float, population: int) -> Positions:
        """Each of range(population) independently with `probability`, sorted."""
        if probability <= 0.0 or population == 0:
            return np.empty(0, np.int64)
        if probability >= 1.0:
            return np.arange(population, dtype=np.int64)
        expected = probability * population
        room = int(expected + 6 * expected**0.5) + 16
        while True:
            out = np.empty(room, np.int64)
            counter, count = _bernoulli(self._key, self._counter, probability, population, out)
            if count >= 0:
                self._counter = counter
                return out[:count]
            room *= 2
