"""DeepVigor beyond the paper: factors with few forwards, held against injection, and what protecting by them buys."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.analysis.deepvigor import DeepVigor, analyze
from flipproof.analysis.factors import estimate_factors
from flipproof.analysis.opened_model import opened
from flipproof.campaigns.assess import assess
from flipproof.campaigns.statistics import sample_size, wilson_interval
from flipproof.errors import FlipproofWarning
from flipproof.faults import BitErrorRate
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats import Format
from flipproof.reports.tables import compare
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.storage.choose import select_bits

Batches = list[tuple[Tensor, Tensor]]


def factors_table(network: str, net: nn.Module, data: Batches, *, injections: int | None = None) -> pd.DataFrame:
    """Estimated factors of neurons and weights beside Eq. 7's number of real injections a layer.

    Args:
        network: its name in the table.
        net: the network.
        data: what both draw their inputs from.
        injections: a number a layer instead of Eq. 7's.
    """
    tables = []
    for of, where in (("neurons", Neurons()), ("parameters", Parameters())):
        with warnings.catch_warnings():
            # few images say little about all: both sides of this table are about the images given
            warnings.simplefilter("ignore", FlipproofWarning)
            found = estimate_factors(net, data, where=where)
        found.insert(0, "network", network)
        found.insert(1, "of", of)
        with opened(net, data, where, None, None, 2**28) as prober:
            for i, site in enumerate(prober.sites):
                count = injections or sample_size(prober.batches.samples * site.values * site.width)
                draw = TrialGenerator(1, f"injected {site.name}", 0)
                parts = [draw.below(n, count) for n in (prober.batches.samples, site.values, site.width)]
                critical = prober.inject(site.name, *(torch.from_numpy(part) for part in parts))[1]
                rate, hits = float(critical.double().mean()), int(critical.sum())
                low, high = wilson_interval(hits, count)
                found.loc[i, ["injected", "injected_low", "injected_high"]] = [rate, low, high]
        tables.append(found.assign(error=(found["factor"] - found["injected"]).abs()))
    return pd.concat(tables, ignore_index=True)


def evidence_table(
    network: str,
    net: nn.Module,
    seen: Batches,
    unseen: Batches,
    bers: Sequence[float],
    *,
    trials: int,
    workers: int,
    journal: Path,
    budget: float = 0.1,
    weights: int = 200,
) -> pd.DataFrame:
    """Campaigns on stored weights: nothing protected, the selected bits, as many random bits, every word in SECDED.

    Selected from the analysis of `weights` weights a parameter on `seen`, measured on `unseen`; gains over "nothing",
    and for the selection over "random".
    """
    found = analyze(net, seen, DeepVigor(neurons=weights, ranges=False, holes=0), where=Parameters())
    chosen = select_bits(found, budget=budget)
    everything = [(layer.name, bit) for layer in found.layers_found for bit in range(layer.width)]
    sizes = {layer.name: layer.total for layer in found.layers_found}
    formats: dict[str, dict[str, Format]] = {
        "nothing": dict(chosen.plain),
        "selected": chosen.formats(),
        "random": replace(chosen, table=_at_random(everything, sizes, int(chosen.table["bits"].sum()))).formats(),
        "everything": select_bits(found, budget=None, unit="layers").formats(),
    }
    campaigns = {
        name: assess(
            net,
            data=unseen,
            faults=BitErrorRate(list(bers)),
            format=format,
            trials=trials,
            workers=workers,
            journal=journal / f"{network}-{name}.jsonl",
            progress=False,
        )
        for name, format in formats.items()
    }
    table = compare(**campaigns)
    against = compare(random=campaigns["random"], selected=campaigns["selected"])
    names = ["accuracy_gain", "accuracy_gain_low", "accuracy_gain_high"]
    mine = against[against["campaign"] == "selected"].set_index("ber")[names]
    places = table["campaign"] == "selected"
    for name in names:
        table.loc[places, name.replace("gain", "gain_over_random")] = mine.loc[
            table.loc[places, "ber"], name
        ].to_numpy()
    table.insert(0, "network", network)
    kept = ["network", "campaign", "memory", "ber", "accuracy", "accuracy_low", "accuracy_high", "critical_total"]
    return table[[*kept, *names, *(name.replace("gain", "gain_over_random") for name in names)]]


def _at_random(places: list[tuple[str, int]], sizes: dict[str, int], bits: int) -> pd.DataFrame:
    """Random bit positions of random parameters, as many stored bits as a selection has, as far as whole places fit."""
    order = np.random.default_rng(0).permutation(len(places))
    rows = []
    for i in order.tolist():
        name, bit = places[i]
        if sizes[name] <= bits:
            bits -= sizes[name]
            rows.append({"layer": name, "bit": bit})
    return pd.DataFrame(rows, columns=["layer", "bit"])
