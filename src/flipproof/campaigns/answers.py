"""How each sample of a trial ended, kept in its record: what intervals over samples are made of."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flipproof.errors import JournalError
from flipproof.running.scales import OUTCOMES

Bytes = NDArray[np.uint8]
Signs = NDArray[np.int8]

_CRITICAL = (OUTCOMES.index("critical_sdc"), OUTCOMES.index("due"))


def encode_answers(outcomes: ArrayLike, correct: ArrayLike) -> str:
    """One trial's answers as text: base64 of zlib of one byte a sample, outcome index + 4 · correct.

    Args:
        outcomes: index into `OUTCOMES` of each sample, (N,).
        correct: whether its class is the target, bool (N,).

    Returns:
        The text; "" if every sample is masked (correct is then what it is without faults).

    Example:
        >>> text = encode_answers([0, 2, 3], [True, True, False])
        >>> decode_answers(text, np.ones(3, bool)).tolist()
        [4, 6, 3]
    """
    codes = np.asarray(outcomes, np.uint8)
    return _packed(codes + 4 * np.asarray(correct, np.uint8)) if codes.any() else ""


def decode_answers(text: str, golden: NDArray[np.bool_]) -> Bytes:
    """The inverse of `encode_answers`: one byte a sample, outcome index + 4 · correct.

    Args:
        text: `Trial.answers`.
        golden: which samples are correct without faults, (N,): `decode_golden(header.golden_answers, N)`.

    Raises:
        JournalError: if the text holds another number of samples.
    """
    if not text:
        return (4 * golden).astype(np.uint8)
    return _unpacked(text, len(golden))


def encode_golden(correct: ArrayLike) -> str:
    """Which samples are correct without faults: base64 of zlib of one byte a sample, 1 or 0."""
    return _packed(np.asarray(correct, np.uint8))


def decode_golden(text: str, samples: int) -> NDArray[np.bool_]:
    """The inverse of `encode_golden`, bool (N,).

    Raises:
        JournalError: if the text holds another number of samples.
    """
    return _unpacked(text, samples).astype(bool)


def _packed(content: Bytes) -> str:
    return b64encode(zlib.compress(content.tobytes())).decode("ascii")


def _unpacked(text: str, samples: int) -> Bytes:
    """At most `samples` bytes are ever unpacked, whatever the text says."""
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(b64decode(text, validate=True), samples + 1)
    except (ValueError, zlib.error) as error:
        raise JournalError(
            f"the answers of a record cannot be read ({error}); the journal was edited or damaged"
        ) from None
    if len(content) != samples:
        found = f"more than {samples}" if len(content) > samples else f"{len(content)}"
        raise JournalError(f"the answers of a record are of {found} samples, its campaign has {samples}")
    return np.frombuffer(content, np.uint8)


def holds(codes: Bytes, name: str) -> Signs:
    """1 for each sample that counts for this rate, else 0: an outcome, "critical_total", or "correct"."""
    if name == "correct":
        return np.asarray((codes & 4) > 0, np.int8)
    outcome = codes & 3
    if name == "critical_total":
        return np.asarray(np.isin(outcome, _CRITICAL), np.int8)
    return np.asarray(outcome == OUTCOMES.index(name), np.int8)


@dataclass(frozen=True)
class Crossed:
    """Sums of a trials × samples table of −1, 0 and 1.

    Attributes:
        plus: samples with 1, per trial, (T,).
        minus: samples with −1, per trial, (T,).
        sums: sum over trials, per sample, (N,).
    """

    plus: NDArray[np.int64]
    minus: NDArray[np.int64]
    sums: NDArray[np.int64]

    @classmethod
    def of(cls, table: Iterable[Signs]) -> Crossed:
        """From its rows, (N,), or several at a time, (some trials, N); at least one."""
        plus, minus, sums = [], [], None
        for part in table:
            rows = np.atleast_2d(part)
            plus.append((rows > 0).sum(axis=1))
            minus.append((rows < 0).sum(axis=1))
            here = rows.sum(axis=0, dtype=np.int64)
            sums = here if sums is None else sums + here
        assert sums is not None
        return cls(np.concatenate(plus), np.concatenate(minus), sums)

    @property
    def samples(self) -> int:
        """N."""
        return len(self.sums)

    @property
    def trial_means(self) -> NDArray[np.float64]:
        """Mean over samples of each trial, (T,)."""
        return np.asarray((self.plus - self.minus) / self.samples, np.float64)

    @property
    def sample_means(self) -> NDArray[np.float64]:
        """Mean over trials of each sample, (N,)."""
        return np.asarray(self.sums / len(self.plus), np.float64)

    @property
    def residual(self) -> float:
        """Mean square of what neither the trial nor the sample explains; 0 for a single row or column.

        Σ (y − ȳ_t − ȳ_i + ȳ)² / ((T − 1)(N − 1)).
        """
        trials, samples = len(self.plus), self.samples
        if trials < 2 or samples < 2:
            return 0.0
        mean = float(self.trial_means.mean())
        whole = float((self.plus + self.minus).sum())  # the squares of −1, 0 and 1
        by_trial = samples * float((self.trial_means**2).sum())
        by_sample = trials * float((self.sample_means**2).sum())
        return max(0.0, whole - by_trial - by_sample + trials * samples * mean**2) / ((trials - 1) * (samples - 1))


def crossed_difference(ours: Iterable[Bytes], theirs: Iterable[Bytes], name: str) -> Crossed:
    """The table of ours − theirs, trial by trial and sample by sample."""
    pairs = zip(rows_of(ours), rows_of(theirs), strict=True)
    return Crossed.of(holds(one, name) - holds(other, name) for one, other in pairs)


def rows_of(codes: Iterable[Bytes]) -> Iterator[Bytes]:
    """One trial at a time."""
    for rows in codes:
        yield from rows
