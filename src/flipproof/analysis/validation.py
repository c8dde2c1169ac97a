"""DeepVigor held against injection (PAPERS: deepvigor, section II-D)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn

from flipproof.analysis.probing import Prober
from flipproof.campaigns.batches import Data, read_batches
from flipproof.campaigns.evaluation import eval_mode, golden_run, one_thread
from flipproof.campaigns.neuron_trial import neuron_space
from flipproof.campaigns.statistics import sample_size, wilson_interval
from flipproof.errors import ConfigError
from flipproof.faults.neurons import Neurons
from flipproof.faults.sampling import TrialGenerator
from flipproof.outcomes import Decision

if TYPE_CHECKING:
    from flipproof.analysis.vulnerability import VulnerabilityMap


def validate(
    found: VulnerabilityMap,
    data: Data,
    *,
    model: nn.Module | None = None,
    margin: float = 0.01,
    confidence: float = 0.95,
    injections: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Inject random single flips a layer, each into a random input, and compare with what the ranges say.

    Each injection runs the rest of the network without any shortcut of the analysis.

    Args:
        found: the map.
        data: the analysed set, or another: batches `(inputs, targets)`.
        model: the model, where the map was loaded from a file.
        margin: Eq. 7's e, with the layer's analysed bits × inputs as population.
        confidence: of Eq. 7 and the intervals.
        injections: a number a layer instead of Eq. 7's.
        seed: of the draws.

    Returns:
        One row a layer: `true_non_critical` (of the flips called non-vulnerable, the share that left the class as it
        was), `true_critical` (of those called vulnerable, the share that changed it), Wilson intervals, and how many
        flips were called what. NaN where no flip was called so.

    Raises:
        ConfigError: if the map has no model, or its layers are not those of the model.
    """
    net = model if model is not None else found.model
    if net is None:
        raise ConfigError("this map was loaded from a file and has no model: pass model=")
    formats = {layer.name: _format(layer.format) for layer in found.layers_found}
    where = Neurons(include=tuple(name.partition("[")[0] or "*" for name in formats))
    device = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    rows = []
    with eval_mode(net), one_thread(device):
        batches = read_batches(data, device)
        chosen = {name.partition("[")[0] or "*": value for name, value in formats.items()}
        space = neuron_space(net, batches, where, chosen)
        with space.stored():
            golden = golden_run(net, batches, found.output)
            decision = Decision.from_golden(golden)
            prober = Prober(net, space, batches, found.output, golden, decision, 2**28)
            for layer in found.layers_found:
                site = space.site(layer.name)
                if site.values != layer.total:
                    raise ConfigError(f"{layer.name} has {site.values} neurons, but {layer.total} were analysed")
                population = layer.neurons.numel() * layer.width * batches.samples
                count = injections or sample_size(population, margin=margin, confidence=confidence)
                draw = TrialGenerator(seed, f"validate {layer.name}", 0)
                where_hit = torch.from_numpy(draw.below(population, count)).sort().values
                sample = where_hit // (layer.neurons.numel() * layer.width)
                place = where_hit // layer.width % layer.neurons.numel()
                bit = where_hit % layer.width
                rows.append(_row(found, prober, layer.name, sample, place, bit, confidence))
    return pd.DataFrame(rows)


def _row(
    found: VulnerabilityMap,
    prober: Prober,
    name: str,
    sample: torch.Tensor,
    place: torch.Tensor,
    bit: torch.Tensor,
    confidence: float,
) -> dict[str, object]:
    from flipproof.analysis.vulnerability import verdict

    layer, site = found.layer(name), prober.space.site(name)
    ranges = layer.overall()
    called = torch.zeros(sample.numel(), dtype=torch.int64)
    critical = torch.zeros(sample.numel(), dtype=torch.bool)
    first = 0
    for batch, size in enumerate(prober.batches.sizes):
        here = ((sample >= first) & (sample < first + size)).nonzero()[:, 0]
        if here.numel():
            probes = prober.at(site, batch)
            device = probes.values.device
            row, neuron = (sample[here] - first).to(device), layer.neurons[place[here]].to(device)
            before = probes.values[row, neuron]
            after = site.flipped(before, bit[here].to(device))
            delta = (after.double() - before.double()).cpu()
            called[here] = verdict(ranges[place[here]], delta, layer.nans[place[here]])
            critical[here] = probes.critical(row, neuron, after, shortcuts=False).cpu()
        first += size
    counts = torch.bincount(called, minlength=3).tolist()
    right = (int((~critical[called == 0]).sum()), int(critical[called == 2].sum()))
    result: dict[str, object] = {"layer": name, "injections": sample.numel()}
    for column, hits, total in zip(("true_non_critical", "true_critical"), right, (counts[0], counts[2]), strict=True):
        low, high = wilson_interval(hits, total, confidence=confidence)
        result |= {column: hits / total if total else np.nan, f"{column}_low": low, f"{column}_high": high}
    names = ("called_non_vulnerable", "called_semi_vulnerable", "called_vulnerable")
    return {**result, **dict(zip(names, counts, strict=True)), "critical": int(critical.sum())}


def _format(text: str):  # type: ignore[no-untyped-def]
    from flipproof.specs import parse_format  # reads the formats that a file names; imported late, it imports faults

    return parse_format(text)
