"""Ranges held against injection (Ahmadilivani et al. 2023, section II-D)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import stats

from flipproof.analysis.layer_vulnerability import VERDICTS, LayerVulnerability, distinct, verdict
from flipproof.analysis.probes import Prober
from flipproof.campaigns.statistics import Interval, sample_size
from flipproof.faults.sampling import TrialGenerator


def validate(
    layers: Sequence[LayerVulnerability],
    prober: Prober,
    *,
    margin: float,
    confidence: float,
    injections: int | None,
    seed: int,
) -> pd.DataFrame:
    """Inject random single flips into each of these layers, and compare with what its ranges say.

    `VulnerabilityMap.validate` says what the arguments and columns are; `data` is its to add.
    """
    samples = prober.batches.samples
    rows = []
    for layer in layers:
        population = layer.neurons.numel() * layer.width * samples
        count = injections or sample_size(population, margin=margin, confidence=confidence)
        draw = TrialGenerator(seed, f"validate {layer.name}", 0)
        hit = torch.from_numpy(draw.below(population, count)).sort().values
        sample = hit // (layer.neurons.numel() * layer.width)
        place = hit // layer.width % layer.neurons.numel()
        row = _row(layer, prober, sample, place, hit % layer.width, confidence)
        rows.append({"layer": layer.name, "inputs": samples, **row})
    return pd.DataFrame(rows)


def clustered_interval(right: ArrayLike, asked: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interval of a proportion over inputs: of all flips into inputs like these, the share that is right.

    Wilson's interval, with as many independent flips as would leave the same spread: p (1 − p) / V, V the variance of
    a ratio of sums over inputs (G / (G − 1) · Σ (right − p · asked)² / (Σ asked)²), and Student's t of G − 1 degrees
    (as Korn and Graubard 1998 do for surveys). p and V are taken with one input more that is wrong
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


def _row(
    layer: LayerVulnerability,
    prober: Prober,
    sample: torch.Tensor,
    place: torch.Tensor,
    bit: torch.Tensor,
    confidence: float,
) -> dict[str, object]:
    delta, critical = prober.inject(layer.name, sample, layer.neurons[place], bit)
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
