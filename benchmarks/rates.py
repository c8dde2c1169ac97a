"""Rates to a margin: strata beside uniform injection, with the same interval, stopping rule, data and shortcuts.

Single flips run one image each on both sides, which says most about a rate for each forward. A forward is one image
through the whole network; a trial counts the share of the multiplications from the layer that is hit on. Both sides
begin with the same golden run, which is counted apart. Where uniform injection takes too many trials to run, its number
is simulated: of single flips it follows from the rate alone (they are coin flips), of a bit error rate trials are drawn
from those of the demo.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, one_thread
from benchmarks.rate_coverage import Known, Seen, estimate
from flipproof.campaigns.rates import RateEstimate
from flipproof.datasets import cifar10, digits
from flipproof.demo import RATES, trained_digits_cnn
from flipproof.errors import DataError
from flipproof.models import digits_cnn, load_weights, resnet20

Batches = list[tuple[Tensor, Tensor]]

IMAGES, SEEDS = 100, 3
DEMO = 300
"""Trials a point of `flipproof demo`."""


def run(size: Size) -> list[Row]:
    """Forwards and trials of uniform injection ÷ ours."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FlipproofWarning)
        if size is Size.SMOKE:
            net, data = digits_cnn().eval(), [(torch.rand(12, 1, 8, 8), torch.zeros(12))]
            return [*_flips("untrained digits CNN", net, data, 0.2, seeds=1), *_curve(net, data, (1e-4,), 0.2)]
        rows: list[Row] = []
        try:
            rows += _flips("ResNet-20", *subject(), 0.01, goal=10)
            rows += _fine("ResNet-20", *subject(), 0.001 if size is Size.FULL else 0.003)
        except DataError as error:
            rows.append(Row("ResNet-20: uniform ÷ strata", None, note=str(error)))
        rows += _curve(trained_digits_cnn().eval(), digits("test"), RATES, 0.01 if size is Size.FULL else 0.03)
        return rows


def subject() -> tuple[nn.Module, Batches]:
    """ResNet-20 with public weights, and the first hundred test images.

    Raises:
        DataError: if they are not there.
    """
    root = Path(os.environ.get("DATA", "data"))
    checkpoint = next(root.glob("**/resnet20-*.th"), None)
    if checkpoint is None:
        raise DataError(f"no resnet20-*.th under {root}; DATA=folder says where it is, with CIFAR-10")
    net = resnet20()
    load_weights(net, checkpoint)
    return net.eval(), cifar10(root, "test", limit=IMAGES)


def _flips(
    what: str, net: nn.Module, data: Batches, margin: float, *, goal: float | None = None, seeds: int = SEEDS
) -> list[Row]:
    """Both for real."""
    share, forwards, trials = shares(net, data), {}, {}
    for sampling in ("stratified", "uniform"):
        found = [_single(net, data, margin, sampling, seed) for seed in range(seeds)]
        trials[sampling] = sum(len(sites) for _, sites in found) / seeds
        forwards[sampling] = sum(share[site] for _, sites in found for site in sites) / seeds
    name = f"{what}, critical rate of single flips ± {100 * margin:g} %"
    asked = fp.sample_size(2**40, margin=margin)
    images = sum(len(targets) for _, targets in data)
    ours, theirs = forwards["stratified"], forwards["uniform"]
    return [
        Row(
            f"{name}: uniform ÷ strata, forwards",
            theirs / ours,
            at_least=goal,
            note=f"{theirs:,.0f} ÷ {ours:,.0f} forwards, {trials['uniform']:,.0f} ÷ {trials['stratified']:,.0f} trials",
        ),
        Row(
            f"{name}: the same with the golden run of all {images} images on both sides",
            (theirs + images) / (ours + images),
        ),
        Row(
            f"{name}: the {asked:,} trials that `sample_size` asks for ÷ strata",
            asked / trials["stratified"],
        ),
    ]


def _fine(what: str, net: nn.Module, data: Batches, measured: float) -> list[Row]:
    """Ours for real at a margin; uniform simulated with the rate found. At ± 0.01 % both from the strata found."""
    found, sites = _single(net, data, measured, "stratified", 0)
    rate = float(found.table["critical_total"].iloc[0])
    coin = Known(np.ones(1), np.array([rate]), np.array([0.05]), np.zeros(1, np.int64))
    theirs = float(np.mean([estimate(coin, seed, margin=measured).draws for seed in range(3)]))
    name = f"{what}, critical rate of single flips ± {100 * measured:g} %"
    rows = [Row(f"{name}: uniform (simulated) ÷ strata, trials", theirs / len(sites), note=f"rate {100 * rate:.3f} %")]
    strata = found.strata
    groups = strata["name"].str.split(", ").str[-1]
    hits = (strata["mean"].fillna(0) * strata["trials"]).groupby(groups).transform("sum")
    draws = strata["trials"].groupby(groups).transform("sum")
    fine = 1e-4
    like = Known(
        strata["share"].to_numpy() / strata["share"].sum(),
        (hits / draws.clip(lower=1)).to_numpy(),
        np.full(len(strata), 0.05),
        np.unique(groups, return_inverse=True)[1],
    )
    ours = estimate(like, 0, margin=fine).draws
    coin = Known(np.ones(1), np.array([like.rate]), np.array([0.05]), np.zeros(1, np.int64))
    theirs = float(estimate(coin, 0, margin=fine).draws)
    rows.append(
        Row(
            f"{what}, critical rate of single flips ± {100 * fine:g} %: uniform ÷ strata, trials, both simulated",
            theirs / ours,
            at_least=10,
            note=f"{theirs:,.0f} ÷ {ours:,.0f}, with the rates of strata that the run above found",
        )
    )
    return rows


def _curve(net: nn.Module, data: Batches, rates: Sequence[float], margin: float) -> list[Row]:
    """Accuracy at bit error rates: ours for real, uniform simulated from the demo's own trials."""
    faults = fp.BitErrorRate(rates)
    ours = fp.estimate_rates(net, data, faults=faults, of="accuracy", margin=margin).table["trials"]
    seen = fp.assess(net, data, faults=faults, trials=DEMO).trials.groupby("point")["accuracy"]
    theirs = pd.Series(
        [
            np.mean([estimate(Seen(values.to_numpy()), seed, margin=margin).draws for seed in range(5)])
            if len(values) > 1
            else 1.0
            for _, values in seen
        ]
    )
    name = f"digits CNN, accuracy at {len(rates)} bit error rates ± {100 * margin:g} points"
    spent = DEMO * len(rates)
    return [
        Row(
            f"{name}: uniform (simulated) ÷ strata, trials",
            theirs.sum() / ours.sum(),
            at_least=5,
            note=f"{theirs.sum():,.0f} ÷ {ours.sum():,}",
        ),
        *(
            Row(f"{name}, at {rate:g}: uniform ÷ strata, trials", uniform / strata, note=f"{uniform:,.0f} ÷ {strata:,}")
            for rate, uniform, strata in zip(rates, theirs, ours, strict=True)
        ),
        Row(
            f"{name}: strata ÷ the {spent:,} trials of the demo, which reach no such margin",
            ours.sum() / spent,
            at_most=0.2,
        ),
    ]


def _single(net: nn.Module, data: Batches, margin: float, sampling: str, seed: int) -> tuple[RateEstimate, list[str]]:
    """An estimate, and which tensor each of its trials hit."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "rates.jsonl"
        found = fp.estimate_rates(
            net,
            data,
            faults=fp.RandomBits(1),
            margin=margin,
            sampling=sampling,  # type: ignore[arg-type]
            seed=seed,
            journal=journal,
            cache_bytes=2**30,
        )
        lines = journal.read_text().splitlines()[1:]
    return found, [json.loads(line)["where"][0][0] for line in lines]


def shares(net: nn.Module, data: Batches) -> dict[str, float]:
    """Of each parameter: multiplications from the module that holds it on ÷ all, for modules called one by one."""
    order: list[tuple[str, float]] = []

    def count(name: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        weight = getattr(module, "weight", None)
        many = 0.0
        if isinstance(module, (nn.Conv2d, nn.Linear)) and isinstance(weight, Tensor):
            many = output[0].numel() * weight[0].numel()
        order.append((name, many))

    def hook(name: str) -> Any:
        return lambda module, given, output: count(name, module, given, output)

    leaves = {name: module for name, module in net.named_modules() if not list(module.children())}
    hooks = [module.register_forward_hook(hook(name)) for name, module in leaves.items()]
    net(data[0][0][:1])
    for handle in hooks:
        handle.remove()
    total = sum(many for _, many in order)
    behind: dict[str, float] = {}
    for i, (name, _) in enumerate(order):
        behind.setdefault(name, sum(many for _, many in order[i:]) / total)
    return {name: behind[name.rpartition(".")[0]] for name, _ in net.named_parameters()}
