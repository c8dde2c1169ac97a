"""What to protect first, under a budget, and the formats that do it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.errors import ConfigError
from flipproof.formats import SECDED, Format, TripleMSB

COPIES = 2
"""Of each selected bit, so that the majority of three counts."""


def select(found: VulnerabilityMap, *, budget: float, unit: str = "bits") -> pd.DataFrame:
    """What to protect first: places in order of vulnerability an added bit, until a memory budget is spent.

    A place is a bit position of a layer ("bits"), a neuron ("neurons") or a layer ("layers"); protecting it covers all
    of its bits. What that adds to the memory is what `protected_formats` stores: two copies of each bit (`TripleMSB`),
    or the check bits of `SECDED` for whole layers. Taking places by critical flips an added bit is optimal for the
    share of critical flips covered, up to the last place that does not fit whole; places that do not fit are passed
    over.

    Args:
        found: all neurons analysed, or the factors of those that were stand for their layer ("bits", "layers").
        budget: what may be added, as a share of the bits that the map's neurons or parameters take now, in [0, 1]; 0.05
            selects 2.5 % of the bits, each stored three times then.
        unit: what is protected together.

    Returns:
        One row a chosen place: `layer`, `bit` or `neuron`, `factor`, `bits` covered, `added` bits, `memory`: what this
        place and those above it add, as a share; and `covered`: the share of all critical single flips, of the places
        in the map, covered by them. What the map does not speak of is in `.attrs["left_out"]` and `.attrs["coverage"]`.

    Raises:
        ConfigError: on another unit or budget, or "neurons" of a sampled map.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.eye(2)), net.bias.data.zero_()
        >>> data = [(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))]
        >>> select(fp.analyze(net, data, where=fp.Parameters("weight")), budget=0.1)[["bit", "bits", "added", "memory"]]
           bit  bits  added  memory
        0   30     4      8  0.0625
    """
    if unit not in ("bits", "neurons", "layers") or not 0 <= budget <= 1:
        raise ConfigError(f"select takes a budget in [0, 1] and unit bits, neurons or layers, got {budget!r}, {unit!r}")
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
    critical = float((table["factor"] * table["bits"]).sum())
    gain = table["factor"] * table["bits"] / table["added"]
    table = table[gain > 0].assign(gain=gain).sort_values("gain", ascending=False, kind="stable").drop(columns="gain")
    table = table.reset_index(drop=True)
    room, keep = budget * everything, []
    for i, cost in enumerate(table["added"].tolist()):
        if cost <= room:
            room -= cost
            keep.append(i)
    chosen = table.iloc[keep].reset_index(drop=True)
    chosen["memory"] = chosen["added"].cumsum() / everything
    gains = np.cumsum(chosen["factor"].to_numpy() * chosen["bits"].to_numpy())
    chosen["covered"] = gains / critical if critical else gains
    chosen.attrs.update(coverage=found.coverage, left_out=dict(found.left_out))
    return chosen


def protected_formats(found: VulnerabilityMap, chosen: pd.DataFrame | None = None) -> dict[str, Format]:
    """A format for every layer (or parameter) of a map: what was selected is stored with protection, the rest plainly.

    Selected bits are stored three times, the majority counts (`TripleMSB(inner, protect=bits)`); selected layers are
    stored in `SECDED(inner)`. The result is what `format=` of `assess`, `FaultSpace` and `pack_` take; the copies are
    stored bits, and are hit in the campaign.

    Args:
        found: the map that was selected from.
        chosen: what `select` gave, by bits or layers; None protects every layer.

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
        >>> protected_formats(found, fp.select(found, budget=0.1))
        {'weight': TripleMSB(inner=Float32(), copies=2, protect=(30,))}
    """
    inner = {layer.module: layer.stored_as for layer in found.layers_found}
    if chosen is None:
        return {name: SECDED(format) for name, format in inner.items()}
    if "neuron" in chosen:
        raise ConfigError("a format stores a whole layer: select unit='bits' or unit='layers'")
    names = [str(name).partition("[")[0] for name in chosen["layer"]]
    if "bit" not in chosen:
        return {name: SECDED(format) if name in names else format for name, format in inner.items()}
    bits: dict[str, set[int]] = {}
    for name, bit in zip(names, chosen["bit"].tolist(), strict=True):
        bits.setdefault(name, set()).add(int(bit))
    return {
        name: TripleMSB(format, copies=COPIES, protect=tuple(sorted(bits[name], reverse=True)))
        if name in bits
        else format
        for name, format in inner.items()
    }
