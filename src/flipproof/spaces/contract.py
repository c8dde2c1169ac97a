"""What every space of bits that can be hit has in common, and what a trial draws from one."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flipproof.errors import FaultModelError

Positions = NDArray[np.int64]
"""Global bit numbers of a space."""


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
