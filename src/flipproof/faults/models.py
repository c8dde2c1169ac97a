"""Fault models: which bits of a fault space are hit in one trial."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from flipproof.errors import FaultModelError, FlipproofWarning
from flipproof.faults.sampling import Positions, TrialGenerator

if TYPE_CHECKING:
    from flipproof.faults.space import FaultSpace


@dataclass(frozen=True, eq=False)
class Draw:
    """What one trial drew: global bit numbers of a space. Indices, never tensors."""

    positions: Positions

    def __len__(self) -> int:
        return int(self.positions.size)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that tell this draw from any other; records carry it."""
        return _digest(self.positions, None)


@dataclass(frozen=True, eq=False)
class Faults(Draw):
    """Distinct bits of a fault space and what happens to them.

    Args:
        positions: global bit numbers, whole, from 0, strictly ascending; `FaultSpace.locate` names them, and
            `FaultSpace.faults` makes them of names in any order.
        stuck: None if the bits flip, else the value (0 or 1) they are stuck at.

    Raises:
        FaultModelError: if a position is named twice, they do not ascend, or are no whole numbers from 0.

    Example:
        >>> len(Faults(np.array([3, 40, 700])))
        3
        >>> Faults(np.array([40, 3, 40, 700]))
        Traceback (most recent call last):
            ...
        flipproof.errors.FaultModelError: Faults: positions must ascend, each bit once, got 3 behind 40
    """

    stuck: Literal[0, 1] | None = None

    def __post_init__(self) -> None:
        positions = _whole(self.positions, "Faults")
        object.__setattr__(self, "positions", positions)
        if positions.size > 1 and not (positions[1:] > positions[:-1]).all():
            i = int(np.argmin(positions[1:] > positions[:-1]))
            raise FaultModelError(
                f"Faults: positions must ascend, each bit once, got {positions[i + 1]} behind {positions[i]}"
            )
        if positions.size and positions[0] < 0:
            raise FaultModelError(f"Faults: positions count from 0, got {positions[0]}")
        if self.stuck is not None and (isinstance(self.stuck, bool) or self.stuck not in (0, 1)):
            raise FaultModelError(f"Faults: stuck must be None, 0 or 1, got {self.stuck!r}")

    @property
    def digest(self) -> str:
        return _digest(self.positions, self.stuck)


@dataclass(frozen=True, eq=False)
class Upsets(Draw):
    """Single upsets: a bit of a neuron space for each sample, in the order of the samples.

    Two samples may be hit in the same bit: they are computed apart.

    Args:
        positions: global bit numbers, whole, from 0; `NeuronSpace.places` names them.

    Raises:
        FaultModelError: if a position is no whole number from 0.
    """

    def __post_init__(self) -> None:
        positions = _whole(self.positions, "Upsets")
        object.__setattr__(self, "positions", positions)
        if positions.size and int(positions.min()) < 0:
            raise FaultModelError(f"Upsets: positions count from 0, got {positions.min()}")


def _digest(positions: Positions, stuck: int | None) -> str:
    return blake2b(positions.tobytes() + repr(stuck).encode(), digest_size=8).hexdigest()


def _whole(positions: object, what: str) -> Positions:
    """Positions as int64 in one dimension, which they must be already, but for the width of the integers."""
    found = np.asarray(positions)
    if found.dtype == np.int64 and found.ndim == 1:
        return found
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise FaultModelError(
            f"{what}: positions are whole numbers in one dimension, got {found.dtype} of shape {found.shape}"
        )
    if found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise FaultModelError(f"{what}: positions are int64, got {found.max()}")
    return found.astype(np.int64)


@dataclass(frozen=True)
class FaultModel(ABC):
    """Draws `Faults` from a fault space with a given generator.

    A new fault model is a frozen dataclass whose first field may be a sweep: give `draw` for a single point and name
    the field in `swept`. `flipproof.testing.FaultModelContract` is the suite it has to pass.
    """

    swept: ClassVar[str]
    """The field that may hold several values: each is one point of a campaign and one column of its records."""

    @abstractmethod
    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """The faults of one trial. Distinct bits; a function of space and generator alone."""

    @abstractmethod
    def check(self, space: FaultSpace) -> None:
        """Raise FaultModelError if this point makes no sense for the space; warn if it does nothing."""

    def repeats(self, space: FaultSpace) -> bool:
        """True if every trial of this point draws the same faults, so that one trial says everything."""
        return False

    def points(self) -> tuple[Self, ...]:
        """The sweep, one single-valued model a point."""
        return tuple(replace(self, **{self.swept: value}) for value in self._values())

    def coordinates(self) -> dict[str, float | int]:
        """The columns that tell this point's records from another's, e.g. ``{"ber": 1e-05}``."""
        return {self.swept: self._single()}

    def _values(self) -> tuple[Any, ...]:
        value = getattr(self, self.swept)
        return value if isinstance(value, tuple) else (value,)

    def _single(self) -> Any:
        values = self._values()
        if len(values) != 1:
            raise FaultModelError(f"{self!r} is a sweep of {len(values)} points; draw from one of its .points()")
        return values[0]

    def _normalise(self, kind: type, low: float, high: float, what: str) -> None:
        """Turn the swept field into a plain number or a tuple of them, and check their range."""
        given = getattr(self, self.swept)
        several = isinstance(given, Iterable) and not isinstance(given, str)
        values = list(given) if several else [given]
        if not values:
            raise FaultModelError(f"{type(self).__name__} got an empty sweep: {self.swept}={given!r}")
        for value in values:
            try:
                fits = low <= value <= high and kind(value) == value
            except (TypeError, ValueError):
                fits = False
            if not fits or isinstance(value, bool):
                raise FaultModelError(f"{type(self).__name__}: {self.swept} must be {what}, got {value!r}")
        values = [kind(value) for value in values]
        if len(set(values)) != len(values):
            raise FaultModelError(f"{type(self).__name__}: {self.swept} names a point twice: {values}")
        object.__setattr__(self, self.swept, tuple(values) if several else values[0])


def parameters_of(model: FaultModel) -> dict[str, Any]:
    """Field names and values, for messages and records."""
    return {field.name: getattr(model, field.name) for field in fields(model)}


def _draw_at_rate(ber: float, exact: bool, space: FaultSpace, generator: TrialGenerator) -> Positions:
    if exact:
        return generator.distinct(round(ber * space.bits), space.bits)
    return generator.bernoulli(ber, space.bits)


def _nothing_to_draw(ber: float, exact: bool, space: FaultSpace) -> bool:
    return ber in (0.0, 1.0) or (exact and round(ber * space.bits) in (0, space.bits))


def _check_rate(model: FaultModel, ber: float, exact: bool, space: FaultSpace) -> None:
    expected = ber * space.bits
    if exact and round(expected) == 0 and ber > 0:
        warnings.warn(
            f"{model!r} hits no bit at all: {ber:g} × {space.bits:,} bits = {expected:.3g} expected flips, which "
            f"rounds to 0. The point runs once, fault-free; raise the rate, or pass exact=False to draw 0, 1, 2, … "
            f"flips a trial.",
            FlipproofWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class BitErrorRate(FaultModel):
    """Random bit flips at a rate per stored bit, the field's standard model.

    With ``exact=True`` every trial flips exactly round(ber × bits) distinct bits, uniformly among all subsets of that
    size; with ``exact=False`` every bit flips independently with probability ber, so the count is binomial. The count
    is taken over the whole fault space, never layer by layer: small layers are hit as often as their bits deserve.

    Args:
        ber: flips per stored bit, in [0, 1]; a sequence is a sweep.
        exact: fixed count or independent bits.
        spread: "bits" draws uniformly over bits. "layers" first draws a layer uniformly for each flip, then one of
            its bits, as FORTUNE's code does (small layers are hit far more often per bit).

    Raises:
        FaultModelError: on a rate outside [0, 1], an empty sweep or a repeated point.

    Example:
        >>> import flipproof as fp
        >>> fp.BitErrorRate([1e-6, 1e-5]).points()[1]
        BitErrorRate(ber=1e-05, exact=True, spread='bits')
    """

    ber: float | Sequence[float]
    exact: bool = True
    spread: Literal["bits", "layers"] = "bits"
    swept: ClassVar[str] = "ber"

    def __post_init__(self) -> None:
        self._normalise(float, 0.0, 1.0, "a rate in [0, 1]")
        if self.spread not in ("bits", "layers"):
            raise FaultModelError(f"BitErrorRate: spread must be 'bits' or 'layers', got {self.spread!r}")

    def repeats(self, space: FaultSpace) -> bool:
        """Only if the rate comes to no bit, or all of them."""
        return _nothing_to_draw(self._single(), self.exact, space)

    def check(self, space: FaultSpace) -> None:
        """Warn where the rate rounds to no flip at all."""
        _check_rate(self, self._single(), self.exact, space)

    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """Distinct bits at this rate."""
        ber = self._single()
        if self.spread == "bits":
            return Faults(_draw_at_rate(ber, self.exact, space, generator))
        count = round(ber * space.bits) if self.exact else generator.bernoulli(ber, space.bits).size
        return Faults(_spread_over_layers(count, space, generator))


def _spread_over_layers(count: int, space: FaultSpace, generator: TrialGenerator) -> Positions:
    """`count` distinct bits: a layer uniformly, then a bit of it; a layer with every bit taken is passed over."""
    room = np.array([sum(last - first for first, last in spans) for spans in space.layers.values()])
    per_layer = np.zeros(room.size, np.int64)
    while (missing := count - int(per_layer.sum())) > 0:
        open_layers = np.flatnonzero(per_layer < room)
        chosen = open_layers[generator.below(open_layers.size, missing)]
        per_layer = np.minimum(per_layer + np.bincount(chosen, minlength=room.size), room)
    drawn = []
    for spans, hits, size in zip(space.layers.values(), per_layer.tolist(), room.tolist(), strict=True):
        inside = generator.distinct(hits, size)
        start = 0
        for first, last in spans:
            part = inside[(inside >= start) & (inside < start + last - first)]
            drawn.append(part - start + first)
            start += last - first
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)


@dataclass(frozen=True)
class BitPosition(FaultModel):
    """One bit position flipped in every value of the space, a point a bit: which bit is critical?

    With every value hit nothing is random, so one trial a point says everything and its interval has no width. Values
    stored in fewer bits than the position have no such bit and stay as they are.

    Flipping a constant exponent bit in *every* value multiplies all of them by one factor, which a network may hardly
    notice; `share` hits a random part of the values instead, as memory faults do.

    Args:
        bits: a position (0 is the least significant) or several.
        share: of the values that are hit, in (0, 1]; at least one value is.

    Raises:
        FaultModelError: on a negative position or one that no value has, or a share outside (0, 1].

    Example:
        >>> import flipproof as fp
        >>> len(fp.BitPosition(range(32)).points())
        32
    """

    bits: int | Iterable[int]
    share: float = 1.0
    swept: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        self._normalise(int, 0, 63, "a bit position from 0 to 63")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise FaultModelError(f"BitPosition: share must be in (0, 1], got {self.share!r}")
        object.__setattr__(self, "share", float(self.share))

    def coordinates(self) -> dict[str, float | int]:
        """The column ``bit``."""
        return {"bit": self._single()}

    def repeats(self, space: FaultSpace) -> bool:
        """Where every value is hit, nothing is drawn at random."""
        return self.share == 1.0

    def check(self, space: FaultSpace) -> None:
        """Raise where no value is that wide."""
        widest = max(site.width for site in space.sites)
        if self._single() >= widest:
            raise FaultModelError(f"{self!r}: the widest stored value has {widest} bits, so bits 0 to {widest - 1}")

    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """That bit of every value, or of a random share of them."""
        bit = self._single()
        hit = np.concatenate([s.offset + s.positions(bit) for s in space.sites if bit < s.width])
        if self.share < 1.0:
            hit = hit[generator.distinct(max(1, round(self.share * hit.size)), hit.size)]
        return Faults(hit)


@dataclass(frozen=True)
class RandomBits(FaultModel):
    """A fixed number of distinct bits, uniform over the space: single and multiple upsets.

    Args:
        count: bits a trial, or several counts as a sweep.

    Raises:
        FaultModelError: on a negative count or more bits than the space has.

    Example:
        >>> import flipproof as fp
        >>> fp.RandomBits(1)
        RandomBits(count=1)
    """

    count: int | Sequence[int]
    swept: ClassVar[str] = "count"

    def __post_init__(self) -> None:
        self._normalise(int, 0, 2**62, "a whole number of bits")

    def repeats(self, space: FaultSpace) -> bool:
        """Only if there is nothing to choose: no bit, or all of them."""
        return self._single() in (0, space.bits)

    def check(self, space: FaultSpace) -> None:
        """Raise where the space has fewer bits."""
        if self._single() > space.bits:
            raise FaultModelError(f"{self!r}: the fault space has only {space.bits:,} bits")

    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """That many distinct bits."""
        return Faults(generator.distinct(self._single(), space.bits))


@dataclass(frozen=True)
class StuckAt(FaultModel):
    """Cells that always read the same value: ageing, manufacturing defects.

    A stuck cell that already holds the value changes nothing, so about half the faults of a trial show: records carry
    both numbers, `faults` (cells stuck) and `flips` (bits that changed).

    Args:
        ber: stuck cells per stored bit, in [0, 1]; a sequence is a sweep.
        value: what they read, 0 or 1.
        exact: a fixed count, or independent cells.

    Raises:
        FaultModelError: on a rate outside [0, 1] or another value.

    Example:
        >>> import flipproof as fp
        >>> fp.StuckAt(1e-4, value=1).coordinates()
        {'ber': 0.0001, 'stuck_at': 1}
    """

    ber: float | Sequence[float]
    value: Literal[0, 1] = 1
    exact: bool = True
    swept: ClassVar[str] = "ber"

    def __post_init__(self) -> None:
        self._normalise(float, 0.0, 1.0, "a rate in [0, 1]")
        if self.value not in (0, 1):
            raise FaultModelError(f"StuckAt: value must be 0 or 1, got {self.value!r}")
        object.__setattr__(self, "value", int(self.value))

    def coordinates(self) -> dict[str, float | int]:
        """The columns ``ber`` and ``stuck_at``."""
        return {"ber": self._single(), "stuck_at": self.value}

    def repeats(self, space: FaultSpace) -> bool:
        """Only if the rate comes to no cell, or all of them."""
        return _nothing_to_draw(self._single(), self.exact, space)

    def check(self, space: FaultSpace) -> None:
        """Warn where the rate rounds to no cell at all."""
        _check_rate(self, self._single(), self.exact, space)

    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """Distinct cells at this rate."""
        return Faults(_draw_at_rate(self._single(), self.exact, space, generator), stuck=self.value)
