"""Vulnerability factors to a margin, with few forwards (PAPERS: deepvigor, and its successor's goal)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from flipproof.analysis.asking import check_asked
from flipproof.analysis.covering import spoken_of
from flipproof.analysis.opening import by_batch, opened, suffix_shares
from flipproof.analysis.probing import Prober
from flipproof.analysis.search import Search
from flipproof.analysis.weights import WeightProber
from flipproof.campaigns.batches import Data, Output
from flipproof.campaigns.statistics import half_width, mean_interval, sample_size
from flipproof.errors import ConfigError
from flipproof.faults.neuron_sites import Neurons, NeuronSite
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.selection import FormatChoice
from flipproof.faults.sites import Parameters, Site

FIRST = 128
"""Pairs of a place and an input to begin with."""


def estimate_factors(
    model: nn.Module,
    data: Data,
    *,
    where: Neurons | Parameters | None = None,
    format: FormatChoice = None,
    output: Output = None,
    margin: float = 0.01,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The vulnerability factor of each layer or parameter to ± `margin`, from searches of random places and inputs.

    VF = the share of (place, input, bit) whose single flip changes the class. Statistical injection draws such triples
    and needs Eq. 7's number of forwards a layer. Here a pair (place, input) is drawn and all its bits are decided at
    once by DeepVigor's search, a few runs of what lies behind the layer; pairs are drawn until the interval of their
    mean is narrow enough. The search assumes that larger errors of a sign stay critical; `analyze` reports how often
    they do not.

    Args:
        model: any classifier, as for `analyze`.
        data: batches `(inputs, targets)`; every batch costs a forward a layer before it is asked about, so a few
            batches are cheaper than a test set.
        where: `fp.Neurons(…)`, all by default, or `fp.Parameters(…)`.
        format: how they are stored.
        output: picks the tensor to judge out of what the model returns.
        margin: half-width of the intervals.
        confidence: of the intervals. They are Student's t over pairs, widened by what unseen pairs could change.
        seed: of the pairs.

    Returns:
        One row a layer: `factor` with `factor_low` and `factor_high`, `pairs` drawn, `forwards` that took (rows through
        what lies behind the layer, weighed by multiplications, and rows that recorded and checked the golden run),
        `injections` (Eq. 7's for the same margin) and `fewer` = injections ÷ forwards. What they do not speak of is in
        `.attrs["left_out"]` and `.attrs["coverage"]`, as of a `VulnerabilityMap`.

    Raises:
        ConfigError: on a margin or confidence outside (0, 1).
        FlipproofError: one of its kinds, as for `analyze`.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = estimate_factors(net, [(torch.randn(16, 4), torch.zeros(16))], margin=0.02)
        >>> found["layer"].tolist(), bool(((found["factor_high"] - found["factor_low"]) <= 0.04).all())
        (['0', '2'], True)
    """
    if not 0 < margin < 1 or not 0 < confidence < 1:
        raise ConfigError(f"estimate_factors takes margin and confidence in (0, 1), got {margin!r} and {confidence!r}")
    check_asked("estimate_factors", model, Neurons() if where is None else where, (Neurons, Parameters), format)
    with opened(model, data, where or Neurons(), format, output, 2**28) as prober:
        share = suffix_shares(model, prober)
        rows = [_row(prober, site, share[site.name], margin, confidence, seed) for site in prober.sites]
        coverage, left_out = spoken_of(model, prober)
    table = pd.DataFrame(rows)
    table.attrs.update(coverage=coverage, left_out=left_out)
    return table


def _row(
    prober: Prober | WeightProber, site: NeuronSite | Site, share: float, margin: float, confidence: float, seed: int
) -> dict[str, object]:
    samples = prober.batches.samples
    injections = sample_size(samples * site.values * site.width, margin=margin, confidence=confidence)
    draw = TrialGenerator(seed, f"factors {site.name}", 0)
    asked, (whole, suffix) = prober.probes, prober.recorded
    values = np.zeros(0)
    layers: dict[int, object] = {}
    while True:
        wanted = min(max(FIRST, values.size // 3), injections - values.size)
        pairs = (draw.below(samples, wanted), draw.below(site.values, wanted))
        values = np.concatenate([values, _critical_share(prober, site, *pairs, layers)])
        low, high = mean_interval(values, confidence=confidence, bounds=(0.0, 1.0))
        if half_width((low, high)) <= margin or values.size >= injections:
            break
    recorded = prober.recorded
    forwards = (prober.probes - asked + recorded[1] - suffix) * share + recorded[0] - whole
    return {
        "layer": site.name,
        "factor": float(values.mean()),
        "factor_low": low,
        "factor_high": high,
        "pairs": values.size,
        "forwards": forwards,
        "injections": injections,
        "fewer": injections / forwards if forwards else np.inf,
    }


def _critical_share(
    prober: Prober | WeightProber,
    site: NeuronSite | Site,
    sample: NDArray[np.int64],
    place: NDArray[np.int64],
    layers: dict[int, object],
) -> NDArray[np.float64]:
    """The share of critical bits of each pair; a batch's layer is opened once and kept in `layers`."""
    found, places = torch.zeros(sample.size, dtype=torch.float64), torch.from_numpy(place)
    for batch, here, rows in by_batch(prober, torch.from_numpy(sample)):
        if batch not in layers:
            layers[batch] = prober.at(site, batch)  # type: ignore[arg-type]
        search = Search(layers[batch], rows, places[here])  # type: ignore[arg-type]
        found[here] = search.critical.double().mean(dim=1)
    return found.numpy()
