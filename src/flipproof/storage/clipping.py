"""Which stored bits are constant, which are critical, and which to clip (Parchekani et al. 2024, III-B and IV-B)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.campaigns.assess import assess
from flipproof.errors import FlipproofWarning, FormatError
from flipproof.faults import BitPosition
from flipproof.formats import BitClipped, Float32, Format
from flipproof.formats.layout import Layout
from flipproof.running.data import Data, Output
from flipproof.running.metrics import Metrics
from flipproof.running.tasks.base import Task
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.spaces.tensors import FormatChoice


def bit_profile(model: nn.Module, format: FormatChoice = None, *, where: Parameters | None = None) -> pd.Series:
    """How often each stored bit is 1, over all stored words of a model.

    mean_b = (number of words whose bit b is 1) / (number of words that have a bit b); exactly 0.0 or 1.0 where the bit
    is constant.

    Args:
        model: any module.
        format: how its parameters are stored, see `assess`; None for each parameter's own float type. All must be
            equally wide.
        where: which parameters, all by default.

    Returns:
        A series indexed by bit, 0 the least significant.

    Raises:
        FormatError: if words of different widths are mixed.
        FaultSpaceError: if nothing is stored.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(100, 10)  # weights in [-0.1, 0.1]
        >>> profile = fp.bit_profile(net, fp.Float32())
        >>> float(profile[30]), len(profile)
        (0.0, 32)
    """
    ones: np.ndarray | None = None
    total = np.zeros((), np.int64)
    for _, format_, words in _stored_words(model, format, where):
        counts = _ones(words, format_.width)
        if ones is not None and ones.size != counts.size:
            raise FormatError(
                f"bit_profile needs words of one width, this model's have {ones.size} and {counts.size} bits; "
                f"profile them apart with where=fp.Parameters(include=…)"
            )
        ones = counts if ones is None else ones + counts
        total = total + _having(format_.layout(words.numel()), format_.width)
    assert ones is not None  # FaultSpace refuses an empty space
    return pd.Series(ones / total, index=pd.RangeIndex(ones.size, name="bit"), name="mean")


def _stored_words(
    model: nn.Module, format: FormatChoice = None, where: Parameters | None = None
) -> Iterator[tuple[str, Format, Tensor]]:
    """Every stored tensor of a model: its qualified name, its format and its words."""
    space = FaultSpace(model, where=where, format=format)
    for site in space.sites:
        inner = site.format.inner if isinstance(site.format, BitClipped) else site.format  # what memory holds
        yield site.name, site.format, inner.encode(space.tensors[site.name]).words


def _ones(words: Tensor, width: int) -> np.ndarray:
    flat = words.reshape(-1)
    return np.array([int(((flat >> bit) & 1).sum(dtype=torch.int64)) for bit in range(width)], np.int64)


def _having(layout: Layout, width: int) -> np.ndarray:
    """How many words have each bit: words of a block may differ in width."""
    whole, over = (np.array(widths, np.int64)[:, None] > np.arange(width) for widths in (layout.block, layout.tail))
    having: np.ndarray = layout.blocks * whole.sum(axis=0) + over.sum(axis=0)
    return having


def bit_criticality(
    model: nn.Module,
    data: Data,
    format: FormatChoice = None,
    *,
    bits: Sequence[int] | None = None,
    share: float = 1.0,
    trials: int = 20,
    seed: int = 0,
    where: Parameters | None = None,
    metrics: Metrics | None = None,
    output: Output = None,
    task: Task | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The bit-wise experiment: each bit position in turn flipped in stored words, and what that does.

    Args:
        model: any module that `assess` takes.
        data: batches `(inputs, targets)`.
        format: how parameters are stored, see `assess`.
        bits: which positions; None for all. A bit is measured alike whichever others are.
        share: of the words that are hit. 1.0, every word, is the paper's experiment and runs once a bit. There a flip
            of a constant exponent bit multiplies all weights by the same factor, which a network may survive although
            single flips of that bit are fatal, or the reverse; a small share is what memory faults look like.
        trials: repetitions a bit, where `share` leaves something to draw.
        seed: of the draws.
        where: which parameters, all by default.
        metrics: see `assess`.
        output: see `assess`.
        task: see `assess`.
        device: see `assess`.
        progress: see `assess`.

    Returns:
        One row a bit: `bit`, `mean` (of `bit_profile`), `constant`, each metric and its `…_drop`, the outcome rates and
        `critical_total` (critical SDC and DUE).

    Raises:
        FaultModelError: for `bits` that no word has.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(5, 3), torch.randn(50, 5)
        >>> table = fp.bit_criticality(net, [(x, net(x).argmax(dim=1))], share=0.1)
        >>> table.set_index("bit").loc[[0, 30], ["mean", "constant"]].round(1).values.tolist()
        [[0.4, False], [0.0, True]]
    """
    profile = bit_profile(model, format, where=where)
    result = assess(
        model,
        data=data,
        faults=BitPosition(list(range(len(profile)) if bits is None else bits), share=share),
        format=format,
        where=where,
        trials=trials,
        seed=seed,
        metrics=metrics,
        output=output,
        task=task,
        device=device,
        progress=progress,
    )
    summary = result.summary
    dropped = [
        c for c in map(str, summary) if c.endswith(("_low", "_high")) or c in ("point", "ber", "trials", "flips")
    ]
    table = summary.drop(columns=dropped).astype({"bit": int})
    table.insert(1, "mean", profile.to_numpy()[table["bit"]])
    table.insert(2, "constant", table["mean"].isin([0.0, 1.0]))
    return table


def choose_clipping(
    model: nn.Module,
    data: Data,
    *,
    per: Literal["model", "tensor"] = "model",
    format: Format | None = None,
    most: int | None = 1,
    share: float = 0.01,
    trials: int = 20,
    seed: int = 0,
    where: Parameters | None = None,
    metrics: Metrics | None = None,
    output: Output = None,
    task: Task | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> BitClipped | dict[str, Format]:
    """Weight bit clipping (WBC): the format that forces the bits which are constant *and* critical.

    `bit_profile` says which bits have one value in all weights: forcing them changes no fault-free output and costs no
    memory. `bit_criticality` says what flipping each of these does; no other can be chosen. The paper flips the bit in
    every weight (``share=1.0``); here it is one weight in a hundred, see `bit_criticality`.

    With ``per="model"`` the most critical bits that are constant over the whole model are clipped, in every tensor.
    One weight of 2.0 or more anywhere (a BatchNorm scale, a clipping bound) makes bit 30 vary over the model; then
    ``per="tensor"`` helps: the most critical bits are chosen first, and each tensor clips those that are constant
    within it. The other tensors stay as they are.

    Args:
        model: any module that `assess` takes.
        data: batches `(inputs, targets)` to measure criticality on; not the data that the result is judged on.
        per: where a bit must be constant to be clipped: in the whole "model", or in one "tensor" at a time.
        format: how parameters are stored; None for `Float32()`.
        most: how many bits to clip at most, the most critical first; None for every bit whose flip changes a decision.
            The paper clips one.
        share: of the words that are hit when criticality is measured.
        trials: repetitions a bit.
        seed: of the draws.
        where: which parameters, all by default; what it leaves out is not in the mapping of ``per="tensor"``.
        metrics: the first one ranks the bits by its drop; ties go to the higher `critical_total`, then the higher bit.
        output: see `assess`.
        task: see `assess`.
        device: see `assess`.
        progress: see `assess`.

    Returns:
        What `format=` of `assess` takes: one format, e.g. ``BitClipped(inner=Float32(), zeros=(30,), ones=())``, or
        with ``per="tensor"`` a mapping {qualified name: format}.

    Raises:
        FormatError: if no critical bit is constant, with what the profile says.

    Warns:
        FlipproofWarning: with ``per="model"``, if another bit is more critical, but constant in nine of ten words only,
            so that clipping cannot protect it. Two trials of each such bit and of the best that is constant decide.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> data = [(x, net(x).argmax(dim=1))]
        >>> fp.choose_clipping(net, data)
        BitClipped(inner=Float32(), zeros=(30,), ones=())
        >>> _ = torch.nn.init.constant_(net.bias, 2.0)  # its bit 30 is 1
        >>> formats = fp.choose_clipping(net, data, per="tensor", share=0.2)
        >>> formats["weight"].zeros, formats["bias"].ones
        ((30,), (30,))
    """
    if per not in ("model", "tensor"):
        raise FormatError(f"choose_clipping takes per='model' or per='tensor', got {per!r}")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise FormatError(f"choose_clipping takes most ≥ 1 bits, or None for all that qualify, got {most!r}")
    inner = format or Float32()
    measure = partial(
        bit_criticality,
        model,
        data,
        inner,
        share=share,
        seed=seed,
        where=where,
        metrics=metrics,
        output=output,
        task=task,
        device=device,
        progress=progress,
    )
    if per == "tensor":
        critical = _critical(measure(trials=trials))
        return _clipped_tensors(model, inner, where, critical["bit"].head(most or len(critical)).tolist())
    differing = bit_profile(model, inner, where=where).map(lambda mean: min(mean, 1 - mean))
    constant = differing[differing == 0].index.tolist()
    critical = _critical(measure(bits=constant, trials=trials)) if constant else pd.DataFrame()
    if critical.empty:
        raise FormatError(
            f"no bit of {inner!r} is both constant over the weights and critical; constant are {constant or 'none'}. "
            f"A few large weights may be all that varies: per='tensor' clips tensor by tensor"
        )
    chosen = critical.head(most or len(critical))
    if nearly := differing[(differing > 0) & (differing < _NEARLY)].index.tolist():
        few = _ranked(measure(bits=sorted([*nearly, int(chosen["bit"].iloc[0])]), trials=min(trials, 2)))
        worst, drop = int(few["bit"].iloc[0]), _drop(few)
        if worst in nearly:
            warnings.warn(
                f"bit {worst} is the most critical ({drop} {float(few[drop].iloc[0]):.3f}) but not constant: "
                f"{differing[worst]:.2g} of the words differ from the rest, so it cannot be clipped; clipping "
                f"{chosen['bit'].tolist()} instead",
                FlipproofWarning,
                stacklevel=2,
            )
    zeros, ones = (tuple(chosen.loc[chosen["mean"] == value, "bit"].tolist()) for value in (0.0, 1.0))
    return BitClipped(inner, zeros=zeros, ones=ones)


_NEARLY = 0.1
"""Share of words that may differ in a bit for it to be a constant one but for a few weights."""


def _drop(table: pd.DataFrame) -> str:
    """The column by which bits are ranked."""
    return next(column for column in map(str, table) if column.endswith("_drop"))


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The most critical bit first."""
    return table.sort_values([_drop(table), "critical_total", "bit"], ascending=False)


def _critical(table: pd.DataFrame) -> pd.DataFrame:
    """Bits whose flips change a decision or cost accuracy, the most critical first."""
    ranked = _ranked(table)
    return ranked[(ranked["critical_total"] > 0) | (ranked[_drop(table)] > 0)]


def _clipped_tensors(model: nn.Module, inner: Format, where: Parameters | None, bits: list[int]) -> dict[str, Format]:
    """Each tensor with those of the bits clipped that are constant in it."""
    formats: dict[str, Format] = {}
    for name, _, words in _stored_words(model, {"*": inner}, where):
        counts = _ones(words, inner.width)
        zeros = tuple(bit for bit in bits if counts[bit] == 0)
        ones = tuple(bit for bit in bits if counts[bit] == words.numel())
        formats[name] = BitClipped(inner, zeros=zeros, ones=ones) if zeros or ones else inner
    if not any(isinstance(format, BitClipped) for format in formats.values()):
        raise FormatError(f"the critical bits {bits} of {inner!r} vary in every tensor; there is nothing to clip")
    return formats
