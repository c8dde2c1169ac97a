"""DeepVigor held against injection (PAPERS: deepvigor, section II-D)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import nn

from flipproof.analysis.layer import VERDICTS, LayerVulnerability, distinct, verdict
from flipproof.analysis.opening import by_batch, opened
from flipproof.analysis.probing import Prober
from flipproof.analysis.weights import WeightProber
from flipproof.campaigns.statistics import Interval, sample_size
from flipproof.errors import ConfigError
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Data, Output
from flipproof.spaces.sites import Neurons, NeuronSite, Parameters, Site

if TYPE_CHECKING:
    from flipproof.analysis.vulnerability import VulnerabilityMap


def validate(
    found: VulnerabilityMap,
    data: Data,
    *,
    model: nn.Module | None = None,
    output: Output = None,
    margin: float = 0.01,
    confidence: float = 0.95,
    injections: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Inject random single flips a layer, each into a random input, and compare with what the ranges say.

    Each injection runs the rest of the network without any shortcut of the analysis. A flip is judged by the range of
    its input's golden class, as the paper's Eq. 3 has it; an input whose class was never analysed by the range over all
    classes. Columns that begin with `overall_` judge every flip by the latter: being what holds for all classes at
    once, it calls more of them semi-vulnerable.

    Ranges are fitted to the analysed inputs. Held against these, the true shares say how well the search worked; what
    to expect of other inputs is only seen by passing others. Intervals are over inputs: flips into one input resemble
    each other, so that few inputs give wide intervals however many flips there are (`clustered_interval`).

    Args:
        found: the map.
        data: the analysed set, or another: batches `(inputs, targets)`.
        model: the model, where the map was loaded from a file.
        output: the function that picks the output, where the map was made with one and loaded from a file.
        margin: Eq. 7's e, with the layer's analysed bits × inputs as population.
        confidence: of Eq. 7 and the intervals.
        injections: a number a layer instead of Eq. 7's.
        seed: of the draws.

    Returns:
        One row a layer: `data` ("analysed" if they are just those of the map, else "other"), `inputs` and `injections`;
        `true_non_critical` (of the flips called non-vulnerable, the share that left the class as it was) and
        `true_critical` (of those called vulnerable, the share that changed it) with `_low` and `_high`, and how many
        flips were called what; the same by the range over all classes in `overall_…`; `without_class`, flips into
        inputs of a class that was not analysed; how many were `critical`, and `critical_rate` with its interval. NaN
        where no flip was called so.

    Raises:
        ConfigError: if the map has no model, or its layers are not those of the model, or on other outputs than those
            that were analysed.
    """
    rows = []
    with reopened(found, data, model, output) as (prober, sites):
        known = "analysed" if prober.batches.digest() in found.data else "other"
        for layer in found.layers_found:
            population = layer.neurons.numel() * layer.width * prober.batches.samples
            count = injections or sample_size(population, margin=margin, confidence=confidence)
            draw = TrialGenerator(seed, f"validate {layer.name}", 0)
            hit = torch.from_numpy(draw.below(population, count)).sort().values
            sample = hit // (layer.neurons.numel() * layer.width)
            place = hit // layer.width % layer.neurons.numel()
            row = _row(layer, prober, sites[layer.name], sample, place, hit % layer.width, confidence)
            rows.append({"layer": layer.name, "data": known, "inputs": prober.batches.samples, **row})
    return pd.DataFrame(rows)


def clustered_interval(right: ArrayLike, asked: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interval of a proportion over inputs: of all flips into inputs like these, the share that is right.

    Wilson's interval, with as many independent flips as would leave the same spread: p (1 − p) / V, V the variance of
    a ratio of sums over inputs (G / (G − 1) · Σ (right − p · asked)² / (Σ asked)²), and Student's t of G − 1 degrees
    (as Korn and Graubard, Survey Methodology 1998, do for surveys). p and V are taken with one input more that is wrong
    half of the time: a few inputs that all agree do not show that all others do. Its coverage is simulated in the
    tests.

    Args:
        right: right flips of each input.
        asked: all flips of each input; inputs with none are left out.
        confidence: of the interval.

    Returns:
        (low, high); (nan, nan) if nothing was asked, (0, 1) of a single input.

    Example:
        >>> [round(bound, 3) for bound in clustered_interval([20] * 50, [20] * 50)]  # 1,000 of 1,000, in 50 inputs
        [0.962, 1.0]
    """
    hits, total = np.asarray(right, np.float64), np.asarray(asked, np.float64)
    hits, total = hits[total > 0], total[total > 0]
    inputs = total.size
    if inputs < 2:
        return (float("nan"), float("nan")) if not inputs else (0.0, 1.0)
    share = float(hits.sum() / total.sum())
    y, m = np.append(hits, total.mean() / 2), np.append(total, total.mean())
    p = y.sum() / m.sum()
    spread = (inputs + 1) / inputs * float(((y - p * m) ** 2).sum()) / m.sum() ** 2
    independent = min(float(total.sum()), p * (1 - p) / spread if spread > 0 else np.inf)
    normal, student = stats.norm.ppf((1 + confidence) / 2), stats.t.ppf((1 + confidence) / 2, inputs - 1)
    independent *= float(normal / student) ** 2
    z = float(normal)
    centre = (share + z**2 / (2 * independent)) / (1 + z**2 / independent)
    half = z / (1 + z**2 / independent) * (share * (1 - share) / independent + z**2 / (4 * independent**2)) ** 0.5
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return (min(low, share), max(high, share))  # rounding may put an end on the wrong side of 0 or 1


@contextmanager
def reopened(
    found: VulnerabilityMap, data: Data, model: nn.Module | None, output: Output = None
) -> Iterator[tuple[Prober | WeightProber, dict[str, NeuronSite | Site]]]:
    """Probes of the map's model on these data, in the map's formats, and its layers by name.

    Raises:
        ConfigError: if the map has no model, its layers are not those of the model, or the outputs judged are not
            those that were analysed.
    """
    net = model if model is not None else found.model
    if net is None:
        raise ConfigError("this map was loaded from a file and has no model: pass model=")
    picked = found.picker.told(output if output is not None else found.output)
    formats = {layer.module or "*": layer.stored_as for layer in found.layers_found}
    kind = Neurons if found.of == "neurons" else Parameters
    with opened(net, data, kind(include=tuple(formats)), formats, picked, 2**28, found.decision) as prober:
        sites = {site.name: site for site in prober.sites}
        for layer in found.layers_found:
            if layer.name not in sites or sites[layer.name].values != layer.total:
                has = sites[layer.name].values if layer.name in sites else "no"
                raise ConfigError(
                    f"{layer.name}: the model has {has} {found.of} there, but {layer.total} were analysed"
                )
        _check_classes(found, prober)
        yield prober, dict(sites)


def _check_classes(found: VulnerabilityMap, prober: Prober | WeightProber) -> None:
    """The same inputs have to have the same golden classes as when they were analysed."""
    for layer in found.layers_found:
        if found.data != (prober.batches.digest(),) or layer.inputs.numel() != prober.decision.classes:
            return
        now = torch.bincount(prober.classes.clamp(min=0), minlength=layer.inputs.numel())
        if not torch.equal(now, layer.inputs):
            raise ConfigError(
                f"the analysed inputs have other golden classes now ({now.tolist()[:10]} inputs a class, were "
                f"{layer.inputs.tolist()[:10]}): the model has changed, or output= is not what {found.picker} was"
            )


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
    layer: LayerVulnerability,
    prober: Prober | WeightProber,
    site: NeuronSite | Site,
    sample: torch.Tensor,
    place: torch.Tensor,
    bit: torch.Tensor,
    confidence: float,
) -> dict[str, object]:
    delta, critical = injected(prober, site, sample, layer.neurons[place], bit)
    golden = prober.classes[sample]
    overall = layer.overall()[place]
    ranges, without = overall.clone(), torch.ones_like(critical)
    for label in distinct(golden).tolist():
        if layer.seen(label):
            here = golden == label
            ranges[here], without[here] = layer.of_label(label)[place[here]], False
    result: dict[str, object] = {"injections": sample.numel()}
    for prefix, judge in (("", ranges), ("overall_", overall)):
        called = verdict(judge, delta, layer.nans[place])
        for column, which, right in (("true_non_critical", 0, ~critical), ("true_critical", 2, critical)):
            result |= _share(f"{prefix}{column}", sample, called == which, right, confidence)
        names = (f"{prefix}called_{name}" for name in VERDICTS)
        result |= dict(zip(names, torch.bincount(called, minlength=3).tolist(), strict=True))
    result |= {"without_class": int(without.sum()), "critical": int(critical.sum())}
    return result | _share("critical_rate", sample, torch.ones_like(critical), critical, confidence)


def _share(
    name: str, sample: torch.Tensor, asked: torch.Tensor, right: torch.Tensor, confidence: float
) -> dict[str, float]:
    """The share of `asked` flips that are `right`, with its interval over inputs."""
    inputs = int(sample.max()) + 1
    each = [torch.bincount(sample[which], minlength=inputs).numpy() for which in (asked & right, asked)]
    total = int(each[1].sum())
    low, high = clustered_interval(*each, confidence=confidence)
    return {name: int(each[0].sum()) / total if total else np.nan, f"{name}_low": low, f"{name}_high": high}
