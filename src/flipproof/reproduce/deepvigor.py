"""DeepVigor (Ahmadilivani et al. 2023): Tables I and II, Figs. 5 and 6, and what a neuron costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

from flipproof.analysis.deepvigor import DeepVigor, analyze
from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.campaigns.assess import assess
from flipproof.datasets import cifar10, mnist
from flipproof.errors import ConfigError
from flipproof.faults import RandomBits
from flipproof.models import alexnet, lenet5, mlp, vgg16
from flipproof.models.training import cached, train_classifier
from flipproof.reports.figures import save
from flipproof.reports.vulnerability import bit_layer_figure, loss_figure, neuron_figure, range_figure
from flipproof.reproduce.deepvigor_use import evidence_table, factors_table
from flipproof.reproduce.published import beside, write_table
from flipproof.spaces.sites import Neurons

SUMMARY = "DeepVigor: vulnerability ranges held against injection, Tables I and II, Figs. 4 to 6; weights; what it buys"

Batches = list[tuple[Tensor, Tensor]]

PUBLISHED = pd.DataFrame(
    [
        ("MLP-sigmoid-mnist", "analysed", 99.985, 100.0),
        ("MLP-relu-mnist", "analysed", 99.991, 100.0),
        ("LeNet-mnist", "analysed", 99.992, 100.0),
        ("LeNet-cifar10", "analysed", 99.956, 100.0),
        ("AlexNet-cifar10", "analysed", 99.973, 99.955),
        ("VGG16-cifar100", "analysed", 99.950, 99.972),
        ("MLP-sigmoid-mnist", "unseen", 99.985, 99.911),
        ("MLP-relu-mnist", "unseen", 99.976, 100.0),
        ("LeNet-mnist", "unseen", 99.992, 100.0),
        ("LeNet-cifar10", "unseen", 99.952, 99.970),
        ("AlexNet-cifar10", "unseen", 99.951, 99.948),
        ("VGG16-cifar100", "unseen", 99.950, 99.972),
    ],
    columns=["network", "data", "true_non_critical", "true_critical"],
)
"""The lowest value over the layers in Tables I and II, in percent."""


@dataclass(frozen=True)
class Study:
    """One network and how much of it is analysed."""

    name: str
    build: Callable[[], nn.Module]
    images: Callable[..., Batches]
    train: int
    epochs: int
    inputs: int
    neurons: int | None = None


def studies(scale: str) -> list[Study]:
    """The paper's networks: training images and epochs, inputs analysed, neurons a layer (all where None)."""
    small = scale == "smoke"
    train, epochs, inputs = (10_000, 4, 32) if small else (50_000, 20, 1000)
    colour = partial(lenet5, in_channels=3, image_size=32)
    found = [
        Study("MLP-sigmoid-mnist", partial(mlp, activation="sigmoid"), mnist, train, 4 * epochs, 4 * inputs),
        Study("MLP-relu-mnist", mlp, mnist, train, epochs, 4 * inputs),
        Study("LeNet-mnist", lenet5, mnist, train, epochs, inputs),
        Study("LeNet-cifar10", colour, cifar10, train, 2 * epochs, inputs),
    ]
    alex = partial(alexnet, batch_norm=True)
    if small:
        narrow = partial(vgg16, batch_norm=True, width=0.25)
        found += [
            Study("AlexNet-cifar10", alex, cifar10, train, epochs, 32, 50),
            Study("VGG16-quarter-cifar10", narrow, cifar10, train, 2 * epochs, 32, 50),
        ]
    else:
        found += [
            Study("AlexNet-cifar10", alex, cifar10, train, epochs, 64, 200),
            Study("VGG16-cifar10", vgg16, cifar10, train, epochs, 32, 100),
        ]
    return found


def reproduce(*, scale: str, data_root: Path, out: Path, workers: int, console: Console) -> None:
    """Analyse, validate on the analysed and on unseen images, and compare LVF with the accuracy lost to injection.

    Raises:
        ConfigError: on an unknown scale.
        DataError: if MNIST or CIFAR-10 is not under `data_root`.
    """
    if scale not in ("smoke", "paper"):
        raise ConfigError(f"scale must be 'smoke' or 'paper', got {scale!r}")
    run(studies(scale), data_root=data_root, out=out, workers=workers, console=console, trials=100)


def run(
    chosen: Sequence[Study],
    *,
    data_root: Path,
    out: Path,
    workers: int,
    console: Console,
    trials: int,
    injections: int | None = None,
    bers: Sequence[float] = (1e-5, 1e-4),
) -> dict[str, VulnerabilityMap]:
    """The studies one after the other; tables and figures of all of them.

    Smaller runs: fewer `trials` a campaign, and `injections` a layer where the estimates of factors are checked, and
    other `bers` where bits are few.
    """
    out.mkdir(parents=True, exist_ok=True)
    maps: dict[str, VulnerabilityMap] = {}
    tables: list[pd.DataFrame] = []
    costs: list[dict[str, object]] = []
    losses: list[pd.DataFrame] = []
    factors: list[pd.DataFrame] = []
    evidence: list[pd.DataFrame] = []
    for study in chosen:
        console.print(f"{study.name} …", highlight=False)
        net = _trained(study, data_root)
        seen = study.images(data_root, "train", limit=study.inputs, batch_size=32)
        unseen = study.images(data_root, "test", limit=study.inputs, batch_size=32)
        found = analyze(net, seen, DeepVigor(neurons=study.neurons))
        maps[study.name] = found
        for name, data in (("analysed", seen), ("unseen", unseen)):
            tables.append(found.validate(data).assign(network=study.name, data=name))
        costs.append(_cost(study, net, found, unseen))
        losses.append(_losses(study, net, found, seen, out, workers, trials))
        save(bit_layer_figure(found), out / f"bits-{study.name}.png")
        save(loss_figure(losses[-1]), out / f"fig5-{study.name}.png")
        if study.neurons is None:
            save(range_figure(found, found.layers["layer"].iloc[-2]), out / f"fig4-{study.name}.png")
            factors.append(factors_table(study.name, net, seen[:1], injections=injections))
            test = study.images(data_root, "test", limit=10 * study.inputs, batch_size=320)
            journal = out / "journals"
            bought = evidence_table(
                study.name, net, seen, test, bers, trials=2 * trials, workers=workers, journal=journal
            )
            evidence.append(bought)
    everything = pd.concat(tables, ignore_index=True)
    lowest = everything.groupby(["network", "data"], sort=False)[["true_non_critical", "true_critical"]].min() * 100
    for value in ("true_non_critical", "true_critical"):
        table = beside(lowest.reset_index(), PUBLISHED, on=["network", "data"], value=value)
        title = f"Tables I and II: {value}, per cent, lowest over the layers"
        write_table(table[["network", "data", value, "published"]], out / f"tables-1-2-{value}", title=title, digits=6)
    write_table(everything, out / "validation", title="Injections a layer: what they were called and what they did")
    write_table(pd.DataFrame(costs), out / "cost", title="Cost: forwards a neuron and input (published 9.1 of 32)")
    loss = pd.concat(losses, ignore_index=True)
    write_table(loss, out / "fig5", title="Fig. 5: LVF and accuracy lost to a single flip, by layer")
    if factors:
        table = pd.concat(factors, ignore_index=True)
        write_table(table, out / "factors", title="Factors to ± 1 point at 95 %: searched beside injected")
        _say_factors(console, table)
        protected = pd.concat(evidence, ignore_index=True)
        write_table(
            protected,
            out / "evidence",
            title="Stored weights: bits selected for protection, campaigns on unseen images",
        )
    lenets = {name: found for name, found in maps.items() if name.startswith("LeNet")}
    if lenets:
        save(neuron_figure(lenets, "conv3"), out / "fig6.png")
    console.print(lowest.to_string(), highlight=False)
    _say(console, lowest.loc[(slice(None), "analysed"), :], loss)
    return maps


def _trained(study: Study, data_root: Path) -> nn.Module:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return study.build()

    def train(net: nn.Module) -> nn.Module:
        images = study.images(data_root, "train", limit=study.train, batch_size=100)
        return train_classifier(net, images, epochs=study.epochs)

    return cached(f"deepvigor-{study.name}-{study.train}-{study.epochs}", build, train)


def _cost(study: Study, net: nn.Module, found: VulnerabilityMap, unseen: Batches) -> dict[str, object]:
    layers = found.layers
    questions = int((layers["analysed"] * layers["inputs"]).sum())
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in unseen)
    return {
        "network": study.name,
        "accuracy_unseen": right / sum(len(y) for _, y in unseen),
        "neurons": int(layers["neurons"].sum()),
        "analysed": int(layers["analysed"].sum()),
        "inputs": found.samples,
        "probes_per_neuron": layers["probes"].sum() / questions,
        "forwards_per_neuron": layers["forwards"].sum() / questions,
        "holes": (layers["hole_rate"].fillna(0) * layers["hole_injections"]).sum()
        / max(1, layers["hole_injections"].sum()),
    }


def _losses(
    study: Study, net: nn.Module, found: VulnerabilityMap, data: Batches, out: Path, workers: int, trials: int
) -> pd.DataFrame:
    rows = []
    for layer, lvf in zip(found.layers["layer"], found.layers["lvf"], strict=True):
        campaign = assess(
            net,
            data=data,
            faults=RandomBits(1),
            where=Neurons(layer),
            trials=trials,
            workers=workers,
            journal=out / "journals" / f"{study.name}-{layer}.jsonl",
            progress=False,
        )
        row = campaign.summary.iloc[0]
        names = [f"{name}{end}" for name in ("accuracy_drop", "critical_total") for end in ("", "_low", "_high")]
        rows.append({"network": study.name, "layer": layer, "lvf": lvf, **{name: row[name] for name in names}})
    return pd.DataFrame(rows)


def _say_factors(console: Console, table: pd.DataFrame) -> None:
    for (network, of), own in table.groupby(["network", "of"], sort=False):
        fewer = own["injections"].sum() / own["forwards"].sum()
        console.print(
            f"{network}, {of}: {fewer:.0f} × fewer forwards than statistical injection at 95 % / 1 %, "
            f"largest difference {100 * own['error'].max():.2f} points",
            highlight=False,
        )


def _say(console: Console, lowest: pd.DataFrame, loss: pd.DataFrame) -> None:
    for name in ("true_non_critical", "true_critical"):
        worst = float(lowest[name].min())
        held = "holds" if worst >= 99.9 else "does not hold"
        console.print(f"{name} ≥ 99.9 % in every layer on the analysed images: {held} (lowest {worst:.3f} %)")
    if min(loss[name].nunique() for name in ("lvf", "critical_total")) < 2:
        return
    correlation = float(spearmanr(loss["lvf"], loss["critical_total"]).statistic)
    console.print(f"LVF and the measured critical rate of the layers: rank correlation {correlation:.2f}")
