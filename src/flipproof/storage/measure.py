"""What a selection buys: the same injections with and without it, at random and everywhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from flipproof.analysis.validation import injected, reopened
from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.campaigns.statistics import mean_interval, wilson_interval
from flipproof.errors import ConfigError
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats import SECDED
from flipproof.running.data import Data
from flipproof.storage.choose import COPIES


def protection(
    found: VulnerabilityMap,
    chosen: pd.DataFrame,
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
        chosen: what `select` gave.
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
        ConfigError: if injections is below 2, or the map has no model.
    """
    if injections < 2:
        raise ConfigError(f"protection needs at least 2 injections, got {injections}")
    draw = TrialGenerator(seed, "protection", 0)
    sizes = [layer.total * layer.width for layer in found.layers_found]
    borders = np.cumsum([0, *sizes])
    total = int(borders[-1])
    position = draw.below(total, injections)
    which = np.searchsorted(borders, position, side="right") - 1
    widths = np.array([layer.width for layer in found.layers_found])
    neuron, bit = np.divmod(position - borders[which], widths[which])
    critical = np.zeros(injections, np.bool_)
    with reopened(found, data, model) as (prober, sites):
        sample = draw.below(prober.batches.samples, injections)
        for i, layer in enumerate(found.layers_found):
            mine = np.flatnonzero(which == i)
            if mine.size:
                parts = [torch.from_numpy(column[mine]) for column in (sample, neuron, bit)]
                critical[mine] = injected(prober, sites[layer.name], *parts)[1].numpy()
    names = np.array([layer.name for layer in found.layers_found], dtype=object)[which]
    covered = np.zeros(injections, np.bool_)
    for _, place in chosen.iterrows():
        here = names == place["layer"]
        if "bit" in chosen:
            here = here & (bit == place["bit"])
        elif "neuron" in chosen:
            here = here & (neuron == place["neuron"])
        covered |= here
    count = int(chosen["bits"].sum()) if len(chosen) else 0
    at_random = np.isin(position, draw.distinct(count, total))
    nobody = np.zeros(injections, np.bool_)
    schemes = {"nothing": (0, nobody), "selected": (count, covered), "random": (count, at_random)}
    schemes["everything"] = (total, ~nobody)
    added = {"selected": int(chosen["added"].sum()) if len(chosen) else 0, "random": COPIES * count}
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
