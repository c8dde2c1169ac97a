"""Which stored tensors a fault space takes, and what it knows of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flipproof.errors import FaultSpaceError
from flipproof.faults.selection import KINDS, Candidate, Kind
from flipproof.formats import Format


@dataclass(frozen=True)
class Parameters:
    """Fault space over a model's parameters: weights, biases, normalisation, thresholds, whatever it registers.

    Args:
        include: glob patterns over qualified names; a module's name takes all it holds. "*" is everything.
        exclude: the same; it wins over `include`.
        buffers: also hit floating-point buffers (BatchNorm's running statistics).
        kinds: keep only these of "weight", "bias", "norm", "buffer", "other"; () keeps all.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> fp.FaultSpace(net, where=fp.Parameters(exclude="*.bias")).bits
        576
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    buffers: bool = False
    kinds: Sequence[Kind] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "kinds"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise FaultSpaceError(f"Parameters: kinds must be among {list(KINDS)}, got {unknown}")

    def selects(self, candidate: Candidate) -> bool:
        """Whether this tensor belongs to the space."""
        return (
            candidate.matches(tuple(self.include))
            and not candidate.matches(tuple(self.exclude))
            and (not self.kinds or candidate.kind in self.kinds)
        )


class Sized:
    """What is stored in one format: how much of it there is."""

    shape: tuple[int, ...]
    format: Format

    @property
    def values(self) -> int:
        """Number of values stored here."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def width(self) -> int:
        """Stored bits a value."""
        return self.format.width

    @property
    def bits(self) -> int:
        """Stored bits in all."""
        return self.values * self.width


@dataclass(frozen=True)
class Site(Sized):
    """One stored tensor of the space.

    Attributes:
        name: qualified name; `aliases` are its other names if it is tied.
        layer: qualified name of the module that owns it.
        kind: "weight", "bias", "norm", "buffer" or "other".
        offset: number of its first bit in the space. Bit b of value v is `offset + v · width + b`.
    """

    name: str
    aliases: tuple[str, ...]
    layer: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    offset: int
