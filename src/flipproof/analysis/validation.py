"""DeepVigor held against injection (PAPERS: deepvigor, section II-D)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    rows = []
    with opened(found, data, model) as prober:
        for layer in found.layers_found:
            population = layer.neurons.numel() * layer.width * prober.batches.samples
            count = injections or sample_size(population, margin=margin, confidence=confidence)
            draw = TrialGenerator(seed, f"validate {layer.name}", 0)
            hit = torch.from_numpy(draw.below(population, count)).sort().values
            sample = hit // (layer.neurons.numel() * layer.width)
            place = hit // layer.width % layer.neurons.numel()
            rows.append(_row(found, prober, layer.name, sample, place, hit % layer.width, confidence))
    return pd.DataFrame(rows)


@contextmanager
def opened(found: VulnerabilityMap, data: Data, model: nn.Module | None) -> Iterator[Prober]:
    """Probes of the map's model on these data, in the map's formats.

    Raises:
        ConfigError: if the map has no model, or its layers are not those of the model.
    """
    net = model if model is not None else found.model
    if net is None:
        raise ConfigError("this map was loaded from a file and has no model: pass model=")
    formats = {layer.name.partition("[")[0] or "*": _format(layer.format) for layer in found.layers_found}
    device = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    with eval_mode(net), one_thread(device):
        batches = read_batches(data, device)
        space = neuron_space(net, batches, Neurons(include=tuple(formats)), formats)
        for layer in found.layers_found:
            values = space.site(layer.name).values
            if values != layer.total:
                raise ConfigError(f"{layer.name} has {values} neurons, but {layer.total} were analysed")
        with space.stored():
            golden = golden_run(net, batches, found.output)
            yield Prober(net, space, batches, found.output, golden, Decision.from_golden(golden), 2**28)


def injected(
    prober: Prober, name: str, sample: torch.Tensor, neuron: torch.Tensor, bit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of these flips and whether they were critical, each run through the rest of the network."""
    site = prober.space.site(name)
    delta = torch.zeros(sample.numel(), dtype=torch.float64)
    critical = torch.zeros(sample.numel(), dtype=torch.bool)
    first = 0
    for batch, size in enumerate(prober.batches.sizes):
        here = ((sample >= first) & (sample < first + size)).nonzero()[:, 0]
        if here.numel():
            probes = prober.at(site, batch)
            device = probes.values.device
            row, place = (sample[here] - first).to(device), neuron[here].to(device)
            before = probes.values[row, place]
            after = site.flipped(before, bit[here].to(device))
            delta[here] = (after.double() - before.double()).cpu()
            critical[here] = probes.critical(row, place, after, shortcuts=False).cpu()
        first += size
    return delta, critical


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

    layer = found.layer(name)
    delta, critical = injected(prober, name, sample, layer.neurons[place], bit)
    called = verdict(layer.overall()[place], delta, layer.nans[place])
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
