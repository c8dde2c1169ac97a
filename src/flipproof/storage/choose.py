"""Which bits to protect first under a memory budget, the formats that do it, and what that buys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.campaigns.statistics import mean_interval, wilson_interval
from flipproof.errors import ConfigError
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats import SECDED, Format, TripleMSB
from flipproof.running.data import Data

COPIES = 2
"""Of each selected bit, so that the majority of three counts."""

_PLACES = {"bits": "bit positions", "neurons": "neurons", "layers": "layers"}


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """What `select_bits` chose to protect.

    Attributes:
        table: one row a chosen place, the first to protect on top: `layer`, `bit` or `neuron`, `factor`, `bits`
            covered, `added` bits; `memory`: what this place and those above it add, as a share of the bits before; and
            `covered`: the share of all critical single flips, of the places in the map, that they cover.
        unit: what a place is: "bits", "neurons" or "layers".
        plain: {name: format}: how every layer or parameter of the map is stored now.
        coverage: share that the map speaks of, see `VulnerabilityMap`.
        left_out: {name: why} of what it does not speak of.
    """

    table: pd.DataFrame
    unit: str
    plain: Mapping[str, Format]
    coverage: float
    left_out: Mapping[str, str]

    def __repr__(self) -> str:
        if self.table.empty:
            return f"Selection(no {_PLACES[self.unit]})"
        last, count = self.table.iloc[-1], len(self.table)
        places = _PLACES[self.unit] if count > 1 else _PLACES[self.unit][:-1]
        return (
            f"Selection({count:,} {places}, {100 * last['memory']:.3g} % more memory, "
            f"{100 * last['covered']:.3g} % of the critical flips covered)"
        )

    def formats(self) -> dict[str, Format]:
        """A format for every layer (or parameter) of the map: the chosen are stored with protection, the rest plainly.

        Chosen bits are stored three times, the majority counts (`TripleMSB(inner, protect=bits)`); chosen layers are
        stored in `SECDED(inner)`. The result is what `format=` of `assess`, `FaultSpace` and `pack_` take; the copies
        and check bits are stored bits, and are hit in the campaign.

        Returns:
            {name: Format}, for the map's layers alone.

        Raises:
            ConfigError: for single neurons, which have no format of their own.

        Example:
            >>> import flipproof as fp, torch
            >>> net = torch.nn.Linear(2, 2)
            >>> _ = net.weight.data.copy_(torch.eye(2)), net.bias.data.zero_()
            >>> data = [(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))]
            >>> found = fp.analyze(net, data, where=fp.Parameters("weight"))
            >>> fp.select_bits(found, budget=0.1).formats()
            {'weight': TripleMSB(inner=Float32(), copies=2, protect=(30,))}
            >>> fp.select_bits(found, budget=None, unit="layers").formats()
            {'weight': SECDED(inner=Float32(), block=None)}
        """
        if self.unit == "neurons":
            raise ConfigError("a format stores a whole layer: select unit='bits' or unit='layers'")
        formats = dict(self.plain)
        stored = self.table["layer"].astype(str).str.split("[").str[0]  # a module that runs twice is stored once
        for name, chosen in self.table.groupby(stored):
            inner = self.plain[str(name)]
            if self.unit == "layers":
                formats[str(name)] = SECDED(inner)
            else:
                bits = sorted({int(bit) for bit in chosen["bit"]}, reverse=True)
                formats[str(name)] = TripleMSB(inner, copies=COPIES, protect=tuple(bits))
        return formats


def select_bits(found: VulnerabilityMap, *, budget: float | None, unit: str = "bits") -> Selection:
    """What to protect first: places in order of critical flips for each added bit, until a memory budget is spent.

    A place is a bit position of a layer ("bits"), a neuron ("neurons") or a layer ("layers"); protecting it covers all
    of its bits. What that adds to the memory is what `Selection.formats` stores: two copies of each bit (`TripleMSB`),
    or the check bits of `SECDED` for whole layers. This order is optimal for the share of critical flips covered, up
    to the first place that does not fit; such places are skipped.

    Args:
        found: all neurons analysed, or the factors of those that were stand for their layer ("bits", "layers").
        budget: what may be added, as a share of the bits that the map's neurons or parameters take now, in [0, 1]; 0.05
            selects 2.5 % of the bits, each stored three times then. None selects every place, critical or not.
        unit: what is protected together.

    Returns:
        The selection; `formats()` gives the formats that store it.

    Raises:
        ConfigError: on another unit or budget, or "neurons" of a sampled map.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.eye(2)), net.bias.data.zero_()
        >>> data = [(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))]
        >>> chosen = fp.select_bits(fp.analyze(net, data, where=fp.Parameters("weight")), budget=0.1)
        >>> chosen
        Selection(1 bit position, 6.25 % more memory, 22.2 % of the critical flips covered)
        >>> chosen.table[["bit", "bits", "added", "memory"]]
           bit  bits  added  memory
        0   30     4      8  0.0625
    """
    share = isinstance(budget, int | float) and not isinstance(budget, bool) and 0 <= budget <= 1
    if unit not in _PLACES or not (budget is None or share):
        raise ConfigError(
            f"select_bits takes a budget in [0, 1] or None, and unit bits, neurons or layers, got {budget!r}, {unit!r}"
        )
    sizes = {layer.name: layer for layer in found.layers_found}
    if unit == "neurons" and any(x.neurons.numel() < x.total for x in found.layers_found):
        raise ConfigError("unit='neurons' needs every neuron analysed; the map holds a sample of them")
    if unit == "bits":
        table = found.bits[["layer", "bit", "bvf"]].rename(columns={"bvf": "factor"})
        table["bits"] = [sizes[name].total for name in table["layer"]]
    elif unit == "neurons":
        table = found.neurons[["layer", "neuron", "nvf"]].rename(columns={"nvf": "factor"})
        table["bits"] = [sizes[name].width for name in table["layer"]]
    else:
        table = found.layers[["layer", "lvf"]].rename(columns={"lvf": "factor"})
        table["bits"] = [sizes[name].total * sizes[name].width for name in table["layer"]]
    if unit == "layers":
        table["added"] = [
            sizes[name].total * (SECDED(sizes[name].stored_as).width - sizes[name].width) for name in table["layer"]
        ]
    else:
        table["added"] = COPIES * table["bits"]
    everything = int(sum(x.total * x.width for x in found.layers_found))
    flips = table["factor"] * table["bits"]
    critical = float(flips.sum())
    ranked = table.assign(gain=flips / table["added"]).sort_values("gain", ascending=False, kind="stable")
    if budget is not None:
        ranked = ranked[_fitting(ranked["added"].where(ranked["gain"] > 0), budget * everything)]
    chosen = ranked.drop(columns="gain").reset_index(drop=True)
    chosen["memory"] = chosen["added"].cumsum() / everything
    chosen["covered"] = (chosen["factor"] * chosen["bits"]).cumsum() / (critical or 1.0)
    return Selection(chosen, unit, _plain(found), found.coverage, dict(found.left_out))


def _plain(found: VulnerabilityMap) -> dict[str, Format]:
    """How each layer or parameter of a map is stored without protection."""
    return {layer.module: layer.stored_as for layer in found.layers_found}


def _fitting(costs: pd.Series, room: float) -> list[bool]:
    """Which costs, one after the other, still fit into the room; NaN never does."""
    fits = []
    for cost in costs.tolist():
        fits.append(cost <= room)
        room -= cost if fits[-1] else 0
    return fits


def measure_protection(
    found: VulnerabilityMap,
    chosen: Selection,
    data: Data,
    *,
    model: nn.Module | None = None,
    injections: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Critical rate of single upsets with nothing protected, with a selection, with as many random bits, with all bits.

    A protected bit is one whose flip is corrected (as SECDED or triple storage would). All four schemes see the same
    injections, each a uniformly random bit of a random input's inference with a whole suffix run, so differences are
    paired. Use data that the map was not made from.

    Args:
        found: the map that was selected from.
        chosen: what `select_bits` gave.
        data: batches `(inputs, targets)`.
        model: the model, where the map was loaded from a file.
        injections: how many.
        confidence: of the intervals.
        seed: of the injections and the random bits.

    Returns:
        Rows "nothing", "selected", "random", "everything": `bits` protected, as a share of all bits; `memory`: the bits
        that storing them so adds, as a share (for "random" two copies of each bit, for "everything" the check bits of
        SECDED); `critical` with Wilson interval, and `gain`: critical rate saved against "nothing", with a paired
        interval over injections; in `gain_over_random` the same against "random".

    Raises:
        ConfigError: if injections is below 2, the map has no model, or the selection is of another map.
    """
    if chosen.plain != _plain(found):
        raise ConfigError(
            f"the selection is of another map: it was made from the layers {', '.join(chosen.plain)}, this map has "
            f"{', '.join(_plain(found))}; give the map that select_bits was called with"
        )
    if injections < 2:
        raise ConfigError(f"measure_protection needs at least 2 injections, got {injections}")
    draw = TrialGenerator(seed, "protection", 0)
    sizes = [layer.total * layer.width for layer in found.layers_found]
    borders = np.cumsum([0, *sizes])
    total = int(borders[-1])
    position = draw.below(total, injections)
    which = np.searchsorted(borders, position, side="right") - 1
    widths = np.array([layer.width for layer in found.layers_found])
    neuron, bit = np.divmod(position - borders[which], widths[which])
    critical = np.zeros(injections, np.bool_)
    with found.reopened(data, model=model) as prober:
        sample = draw.below(prober.batches.samples, injections)
        for i, layer in enumerate(found.layers_found):
            mine = np.flatnonzero(which == i)
            if mine.size:
                parts = [torch.from_numpy(column[mine]) for column in (sample, neuron, bit)]
                critical[mine] = prober.inject(layer.name, *parts)[1].numpy()
    names = np.array([layer.name for layer in found.layers_found], dtype=object)[which]
    covered = np.zeros(injections, np.bool_)
    for _, place in chosen.table.iterrows():
        here = names == place["layer"]
        if chosen.unit == "bits":
            here = here & (bit == place["bit"])
        elif chosen.unit == "neurons":
            here = here & (neuron == place["neuron"])
        covered |= here
    count = int(chosen.table["bits"].sum())
    at_random = np.isin(position, draw.distinct(count, total))
    nobody = np.zeros(injections, np.bool_)
    schemes = {"nothing": (0, nobody), "selected": (count, covered), "random": (count, at_random)}
    schemes["everything"] = (total, ~nobody)
    added = {"selected": int(chosen.table["added"].sum()), "random": COPIES * count}
    added["everything"] = sum(x.total * (SECDED(x.stored_as).width - x.width) for x in found.layers_found)
    left = {name: critical & ~protected for name, (_, protected) in schemes.items()}
    rows = []
    for name, (bits, _) in schemes.items():
        low, high = wilson_interval(int(left[name].sum()), injections, confidence=confidence)
        row: dict[str, str | float] = {"protected": name, "bits": bits / total}
        row |= {"memory": added.get(name, 0) / total, "critical": float(left[name].mean())}
        row |= {"critical_low": low, "critical_high": high}
        for column, other in (("gain", "nothing"), ("gain_over_random", "random")):
            row |= _paired(column, left[other].astype(float) - left[name].astype(float), confidence)
        rows.append(row)
    return pd.DataFrame(rows)


def _paired(column: str, differences: NDArray[np.float64], confidence: float) -> dict[str, float]:
    low, high = mean_interval(differences, confidence=confidence, bounds=(-1.0, 1.0))
    return {column: float(differences.mean()), f"{column}_low": low, f"{column}_high": high}
