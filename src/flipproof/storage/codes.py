"""Which code for which memory: how often a code word is beyond repair, and the code that fits a budget or a rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import bdtrc

from flipproof.errors import ConfigError, FormatError
from flipproof.formats import (
    BCH,
    Affine,
    BFloat16,
    FixedPoint,
    Float8E4M3,
    Float16,
    Float32,
    Format,
    Rounded,
)
from flipproof.formats.bch import check_bits
from flipproof.formats.blocks import Blocks

LINE = 512
"""Stored bits of the longest code words that are tried: a memory line."""

_MORE = 12
"""How many t more are tried, where the last block of a tensor needs them."""

_LINES = (64, 128, 256, 512, 1024, 2048, 4096)


def capacity(ber: float) -> float:
    """How many bits a stored bit can carry at a bit error rate (Shannon 1948): 1 − H(p), H(p) in bits.

    >>> round(capacity(1e-2), 3), round(capacity(3e-2), 3), capacity(0.0)
    (0.919, 0.806, 1.0)
    """
    if not 0 <= ber <= 1:
        raise ConfigError(f"a bit error rate lies in [0, 1], got {ber!r}")
    if ber in (0, 1):
        return 1.0
    return 1 + ber * math.log2(ber) + (1 - ber) * math.log2(1 - ber)


def ideal_rate(data: float, stored: float) -> float:
    """The highest bit error rate at which `stored` bits can carry `data` bits, whatever the code (Shannon 1948).

    NaN if there are fewer stored bits than data, or `data` is not known.

    >>> round(ideal_rate(5, 5.44), 4)  # five bits in what memory at 1 % needs for them
    0.01
    """
    if data != data or data > stored:
        return float("nan")
    return float(brentq(lambda ber: stored * capacity(ber) - data, 0.0, 0.5)) if data < stored else 0.0


def loss(format: Format, ber: float) -> float:
    """The probability that a code word has more faults than its code corrects; of a plain word, that it has any.

    P(X > t), X binomial over the n stored bits of the code word. What is lost is detected, or miscorrected.

    Args:
        format: `BCH`, `SECDED`, or any other, which corrects nothing.
        ber: faults a stored bit, independent of one another.

    Example:
        >>> import flipproof as fp
        >>> f"{loss(fp.BCH(fp.Rounded(fp.Float16(), 11), t=5), 1e-2):.1e}"  # more than 5 of 32 bits
        '7.2e-07'
    """
    bits = format.layout(format.together).bits
    return float(bdtrc(_corrected(format, format.together), bits, ber))


def lost_share(format: Format, words: int, ber: float) -> float:
    """The expected share of a tensor's values that lie in code words beyond repair, its longer last block included.

    >>> import flipproof as fp
    >>> code = fp.BCH(fp.Affine(bits=5, axis=0), t=14, block=385)
    >>> round(lost_share(code, 77_000, 1e-2) / loss(code, 1e-2), 3)
    1.0
    """
    return sum(count * size * lost for size, count, lost in _losses(format, words, ber)) / words


def untouched(format: Format, shape: tuple[int, ...], ber: float) -> float:
    """The probability that every value of a tensor is read as it was stored: no code word has too many faults.

    ∏ (1 − loss) over the code words; faults are independent. That at most t faults are corrected is not estimated but
    proved, by enumeration (tests/formats/test_block_codes.py).

    Example:
        >>> import flipproof as fp
        >>> round(untouched(fp.BCH(fp.Affine(bits=5, axis=0), t=3), (64, 32, 3, 3), 1e-3), 3)
        1.0
        >>> round(untouched(fp.Float32(), (10,), 1e-3), 3) == round((1 - 1e-3) ** 320, 3)
        True
    """
    every = _losses(format, math.prod(shape) + format.constant_words(shape), ber)
    return math.exp(sum(count * math.log1p(-min(lost, 1 - 1e-16)) for _, count, lost in every))


def _losses(format: Format, words: int, ber: float) -> Iterator[tuple[int, int, float]]:
    """(words of a block, how many such blocks, the chance that one is beyond repair): whole blocks, then the last."""
    layout = format.layout(words)
    for block, count in ((layout.block, layout.blocks), (layout.tail, 1 if layout.tail else 0)):
        if count:
            yield len(block), count, float(bdtrc(_corrected(format, len(block)), sum(block), ber))


def survivable(format: Format, share: float = 1e-4) -> float:
    """The bit error rate at which that share of the code words is beyond repair.

    >>> import flipproof as fp
    >>> round(survivable(fp.BCH(fp.Affine(bits=5, axis=0), t=14, block=385)), 4)
    0.0091
    """
    return float(brentq(lambda ber: loss(format, ber) - share, 1e-15, 0.5, xtol=1e-15))


def _corrected(format: Format, words: int) -> int:
    return format.corrected(words) if isinstance(format, Blocks) else 0


def cheapest(inner: Format, ber: float, share: float, *, words: int, line: int = LINE) -> Format | None:
    """The code of fewest stored bits a word of which at most that share of code words is lost.

    Args:
        inner: what is protected; each word stands alone.
        ber: the bit error rate to survive.
        share: of the values that may lie in code words beyond repair.
        words: of the tensor: no block is longer.
        line: most stored bits of a code word.

    Returns:
        A `BCH` format; None if none of this length does.

    Example:
        >>> import flipproof as fp
        >>> found = cheapest(fp.Affine(bits=5, axis=0), 1e-2, 1e-3, words=10_000)
        >>> found, round(found.layout(10_000).bits / 10_000, 2)
        (BCH(inner=Affine(bits=5, axis=0), t=13, block=375, parity=True), 6.58)
    """
    most = max(1, min(words, line // inner.width))
    codes = (_for_all(inner, size, t, ber, share, words) for size, t in _enough(inner.width, ber, share, most, line))
    found = [code for code in codes if code is not None]
    return min(found, key=lambda code: code.layout(words).bits, default=None)


def _for_all(inner: Format, size: int, t: int, ber: float, share: float, words: int) -> BCH | None:
    """The code with which no larger share of the values is lost: the last block, which is longer, may need more t."""
    for more in range(_MORE):
        code = _coded(inner, size, t + more)
        if code is not None and lost_share(code, words, ber) <= share:
            return code
    return None


@lru_cache(maxsize=4096)
def _enough(width: int, ber: float, share: float, words: int, line: int) -> tuple[tuple[int, int], ...]:
    """(words a block, t) of the longest block for each length of line that keeps the loss, and of single words."""
    found = []
    for longest in (length for length in _LINES if length <= line):
        for size in _sizes(longest // width, words):
            t = _least(width, size, ber, share, longest)
            if t is not None:
                found.append((size, t))
                break
    alone = _least(width, 1, ber, share, 64)
    return (*found, *([(1, alone)] if alone is not None else []))


def _sizes(most: int, words: int) -> Iterator[int]:
    """Block lengths, longest first, each about a sixteenth shorter than the one before."""
    size = min(most, words)
    while size >= 2:
        yield size
        size -= max(1, size // 16)


def _least(width: int, words: int, ber: float, share: float, longest: int) -> int | None:
    """The smallest t that keeps the loss of such a block, if its code word is no longer than that."""
    checks = check_bits(width * words, min(longest, _widest(words) * words) - 1)
    stored = width * words + checks + 1
    enough = np.flatnonzero(bdtrc(np.arange(checks.size), stored, ber)[1:] <= share)
    return int(enough[0]) + 1 if enough.size else None


def _widest(words: int) -> int:
    """Stored bits of a word, at most: 64, with room for a last block that is longer and of a longer field."""
    return 64 if words == 1 else 56


def strongest(inner: Format, bits: float, *, words: int, line: int = LINE) -> Format | None:
    """The code that survives the highest rate with at most so many stored bits a word.

    Args:
        inner: what is protected.
        bits: stored bits a word, at most.
        words: of the tensor: no block is longer.
        line: most stored bits of a code word.

    Returns:
        A `BCH` format; None if there is no room for one.

    Example:
        >>> import flipproof as fp
        >>> strongest(fp.Affine(bits=5, axis=0), 16, words=1)
        BCH(inner=Affine(bits=5, axis=0), t=3, block=None, parity=True)
    """
    best: tuple[float, Format] | None = None
    sizes = {1, *(min(int(length // bits), words) for length in _LINES if length <= line)} - {0}
    for size in sizes:
        data = inner.width * size
        t = check_bits(data, int(min(bits, _widest(size)) * size) - 1).size - 1
        code = _coded(inner, size, t) if t else None
        if code is not None and (best is None or survivable(code) > best[0]):
            best = survivable(code), code
    return None if best is None else best[1]


def _coded(inner: Format, words: int, t: int) -> BCH | None:
    """The code; None where its words would be too wide."""
    try:
        return BCH(inner, t=t, block=inner.width * words if words > 1 else None)
    except FormatError:
        return None


_STORED: dict[str, tuple[int, Sequence[Format]]] = {
    "float32": (
        32,
        [Rounded(Float32(), 26), Rounded(Float32(), 20), Float16(), *(Rounded(Float16(), b) for b in (13, 11, 9))],
    ),
    "bfloat16": (16, [Rounded(BFloat16(), b) for b in (14, 12, 11, 10)]),
    "float16": (16, [Rounded(Float16(), b) for b in (14, 12, 11, 10, 9)]),
    "float8 E4M3": (8, [Rounded(Float8E4M3(), b) for b in (7, 6, 5)]),
    "Q15.16": (32, [FixedPoint(3, b) for b in (20, 16, 12, 9, 7)]),
    "8 bits a channel": (8, [Affine(b, axis=0) for b in (7, 6, 5, 4, 3)]),
    "4 bits a channel": (4, [Affine(b, axis=0) for b in (3, 2)]),
}
"""What weights are stored in, its bits, and what it may be stored in instead, the most precise first."""

_CHANNELS = [Affine(b, axis=0) for b in (8, 6, 5, 4, 3)]
"""What weights of any float or fixed point may be stored in, if they have scales of their own."""

BUDGETS = (0.0, -0.25, -0.5, -0.75)
"""Extra memory, as a share of what it is now."""


def code_table(*, line: int = LINE, share: float = 1e-4) -> pd.DataFrame:
    """For each kind of stored number, the best codes that fit into the memory it has, or less of it.

    Of all codes that fit, those that no other one beats in both precision and rate: one row each, with `stored`,
    `memory` (extra, a share), `format` (empty where nothing fits), `data` (bits of a value), `bits` (stored a value),
    `corrects` (faults a code word), `line` (bits of a code word) and `ber`, the bit error rate at which `share` of the
    code words is lost.

    Example:
        >>> table = code_table(line=64)
        >>> row = table[(table["stored"] == "float32") & (table["memory"] == 0)].iloc[-1]
        >>> row["format"], int(row["corrects"])
        ('BCH(inner=Affine(bits=3, axis=0), t=15, block=6, parity=True)', 15)
    """
    rows: list[dict[str, object]] = []
    for stored, (bits, inners) in _STORED.items():
        for budget in BUDGETS:
            best = 0.0
            before = len(rows)
            for inner in (*inners, *_CHANNELS) if bits > 8 else inners:
                code = strongest(inner, bits * (1 + budget), words=10**6, line=line)
                if code is None:
                    continue
                rate = survivable(code, share)
                if rate <= best:
                    continue
                best = rate
                layout = code.layout(code.together)
                rows.append(
                    {
                        "stored": stored,
                        "memory": budget,
                        "format": repr(code),
                        "data": inner.width,
                        "bits": layout.bits / layout.values,
                        "corrects": _corrected(code, code.together),
                        "line": layout.bits,
                        "ber": rate,
                    }
                )
            if len(rows) == before:
                nothing = {"format": "", "data": 0, "bits": 0.0, "corrects": 0, "line": 0, "ber": 0.0}
                rows.append({"stored": stored, "memory": budget} | nothing)
    return pd.DataFrame(rows)


def shannon_ratio(format: Format, ber: float) -> float:
    """Stored bits ÷ the fewest that could carry the same data bits at this rate: 1 is the limit.

    >>> import flipproof as fp
    >>> round(shannon_ratio(fp.BCH(fp.Affine(bits=5, axis=0), t=14, block=385), 1e-2), 3)
    1.222
    """
    layout = format.layout(format.together)
    data = format.inner.width if isinstance(format, Blocks) else layout.bits / layout.values
    return float(np.divide(layout.bits / layout.values * capacity(ber), data))
