"""DeepVigor held against injection (PAPERS: deepvigor, section II-D)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn

from flipproof.analysis.layer import verdict
from flipproof.analysis.opening import by_batch, opened
from flipproof.analysis.probing import Prober
from flipproof.analysis.weights import WeightProber
from flipproof.campaigns.batches import Data
from flipproof.campaigns.statistics import sample_size, wilson_interval
from flipproof.errors import ConfigError
from flipproof.faults.neuron_sites import Neurons, NeuronSite
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.sites import Parameters, Site

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
    with reopened(found, data, model) as (prober, sites):
        for layer in found.layers_found:
            population = layer.neurons.numel() * layer.width * prober.batches.samples
            count = injections or sample_size(population, margin=margin, confidence=confidence)
            draw = TrialGenerator(seed, f"validate {layer.name}", 0)
            hit = torch.from_numpy(draw.below(population, count)).sort().values
            sample = hit // (layer.neurons.numel() * layer.width)
            place = hit // layer.width % layer.neurons.numel()
            rows.append(_row(found, prober, sites[layer.name], sample, place, hit % layer.width, confidence))
    return pd.DataFrame(rows)


@contextmanager
def reopened(
    found: VulnerabilityMap, data: Data, model: nn.Module | None
) -> Iterator[tuple[Prober | WeightProber, dict[str, NeuronSite | Site]]]:
    """Probes of the map's model on these data, in the map's formats, and its layers by name.

    Raises:
        ConfigError: if the map has no model, or its layers are not those of the model.
    """
    net = model if model is not None else found.model
    if net is None:
        raise ConfigError("this map was loaded from a file and has no model: pass model=")
    formats = {layer.module or "*": layer.stored_as for layer in found.layers_found}
    kind = Neurons if found.of == "neurons" else Parameters
    with opened(net, data, kind(include=tuple(formats)), formats, found.output, 2**28, found.decision) as prober:
        sites = {site.name: site for site in prober.sites}
        for layer in found.layers_found:
            if layer.name not in sites or sites[layer.name].values != layer.total:
                has = sites[layer.name].values if layer.name in sites else "no"
                raise ConfigError(
                    f"{layer.name}: the model has {has} {found.of} there, but {layer.total} were analysed"
                )
        yield prober, dict(sites)


def injected(
    prober: Prober | WeightProber,
    site: NeuronSite | Site,
    sample: torch.Tensor,
    neuron: torch.Tensor,
    bit: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of these flips and whether they were critical, each run through the rest of the network."""
    delta = torch.zeros(sample.numel(), dtype=torch.float64)
    critical = torch.zeros(sample.numel(), dtype=torch.bool)
    for batch, here, rows in by_batch(prober, sample):
        probes = prober.at(site, batch)  # type: ignore[arg-type]
        device = probes.values.device
        row, place = rows.to(device), neuron[here].to(device)
        before = probes.values[row, place]
        flips = probes.flips(row, place)
        after = flips[torch.arange(row.numel(), device=device), bit[here].to(device)]
        delta[here] = (after.double() - before.double()).cpu()
        critical[here] = probes.critical(row, place, after, shortcuts=False).cpu()
    return delta, critical


def _row(
    found: VulnerabilityMap,
    prober: Prober | WeightProber,
    site: NeuronSite | Site,
    sample: torch.Tensor,
    place: torch.Tensor,
    bit: torch.Tensor,
    confidence: float,
) -> dict[str, object]:
    layer = found.layer(site.name)
    delta, critical = injected(prober, site, sample, layer.neurons[place], bit)
    called = verdict(layer.overall()[place], delta, layer.nans[place])
    counts = torch.bincount(called, minlength=3).tolist()
    right = (int((~critical[called == 0]).sum()), int(critical[called == 2].sum()))
    result: dict[str, object] = {"layer": site.name, "injections": sample.numel()}
    for column, hits, total in zip(("true_non_critical", "true_critical"), right, (counts[0], counts[2]), strict=True):
        low, high = wilson_interval(hits, total, confidence=confidence)
        result |= {column: hits / total if total else np.nan, f"{column}_low": low, f"{column}_high": high}
    names = ("called_non_vulnerable", "called_semi_vulnerable", "called_vulnerable")
    return {**result, **dict(zip(names, counts, strict=True)), "critical": int(critical.sum())}
