"""Which stored tensors a fault space takes, and what it knows of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from flipproof.errors import FaultSpaceError
from flipproof.formats import Format
from flipproof.formats.layout import Layout
from flipproof.spaces.contract import Positions
from flipproof.spaces.tensors import KINDS, Candidate, Kind


@dataclass(frozen=True)
class Parameters:
    """Fault space over a model's parameters: weights, biases, normalisation, thresholds, whatever it registers.

    Args:
        include: glob patterns over qualified names; a module's name takes all it holds. "*" is everything.
        exclude: the same; it wins over `include`.
        buffers: also hit buffers: BatchNorm's running statistics, integer weights of a quantised checkpoint, tables of
            indices (whose faults raise on a CPU, which is a DUE, but can stop a CUDA device for good: exclude them
            there). Counters that inference never reads (`num_batches_tracked`) stay out, and so do Boolean ones.
        kinds: keep only these of "weight", "bias", "norm", "buffer", "other"; () keeps all. ``kinds=("weight",)`` is
            FORTUNE's view: whatever a module calls a weight, normalisation left aside, and nothing else.

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

    def asks_for(self, candidate: Candidate) -> bool:
        """Whether names and kinds select this tensor; if not, it was left out on purpose."""
        return (
            candidate.matches(tuple(self.include))
            and not candidate.matches(tuple(self.exclude))
            and (not self.kinds or candidate.kind in self.kinds)
        )

    def leaves_out(self, candidate: Candidate) -> str:
        """Why this tensor is not in the space; "" if it is."""
        if not self.asks_for(candidate):
            return "not selected by where="
        if candidate.problem and not candidate.refused:
            return candidate.problem
        if candidate.is_buffer and not self.buffers:
            return "a buffer: fp.Parameters(buffers=True) takes it"
        return ""


def check_where(where: object) -> Parameters:
    """The parameters that were asked for, all of them by default.

    Raises:
        FaultSpaceError: if this says something else.
    """
    if where is None:
        return Parameters()
    if isinstance(where, Parameters):
        return where
    if type(where).__name__ == "Neurons":
        raise FaultSpaceError(
            f"{where!r} are computed values, not stored ones: pass them to fp.assess(…, where=fp.Neurons()) or "
            f"fp.analyze; what is asked for here takes fp.Parameters"
        )
    patterns = f"include={where!r}" if isinstance(where, (str, list, tuple)) else "…"
    raise FaultSpaceError(f"where= takes fp.Parameters({patterns}), got {where!r}")


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
        """Stored bits a value; of the widest word, where check bits of a block make words differ."""
        return self.format.width

    @property
    def bits(self) -> int:
        """Stored bits in all."""
        return self.values * self.width if self.is_even else self.layout.bits

    @property
    def is_even(self) -> bool:
        """Whether every word is `width` bits wide."""
        return self.format.together == 1

    @cached_property
    def layout(self) -> Layout:
        """Which of the words' bits are stored, one behind the other."""
        return Layout.even(self.values, self.width) if self.is_even else self.format.layout(self.values)

    def locate(self, bits: Positions) -> tuple[Positions, Positions]:
        """(value, bit of its word) of bits of this site, counted from its first."""
        if self.is_even:
            value, bit = np.divmod(bits, self.width)
            return value, bit
        return self.layout.locate(bits)

    def positions(self, bit: int) -> Positions:
        """Bit `bit` of every value that has one, counted from the site's first, ascending."""
        values = np.arange(self.values, dtype=np.int64)
        if self.is_even:
            return values * self.width + bit if bit < self.width else values[:0]
        wide = values[self.layout.width(values) > bit]
        return self.layout.first(wide) + bit


@dataclass(frozen=True)
class Site(Sized):
    """One stored tensor of the space.

    Attributes:
        name: qualified name; `aliases` are its other names if it is tied.
        layer: qualified name of the module that owns it.
        kind: "weight", "bias", "norm", "buffer" or "other".
        offset: number of its first bit in the space. Bit b of value v is `offset + v · width + b`; where words of a
            block differ in width, they lie one behind the other just so (`layout`).
    """

    name: str
    aliases: tuple[str, ...]
    layer: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    offset: int
