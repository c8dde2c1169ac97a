"""FORTUNE (Nazari et al. 2024): quantise, protect the MSB with the bits saved; Tables I, II, figures 5–7.

The paper's networks (VGG-11, ResNet-18, AlexNet at 227 × 227, Inception-v3) are `paper`; `smoke` is three that two
cores train or load in minutes: a quarter-width VGG-11 on CIFAR-10, ResNet-20 from a public checkpoint if there is one,
and LeNet-5 on Fashion-MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.campaigns.assess import assess
from flipproof.campaigns.statistics import difference_interval
from flipproof.datasets import cifar10, fashion_mnist
from flipproof.errors import ConfigError
from flipproof.faults import BitErrorRate
from flipproof.formats import SECDED, Affine, TripleMSB
from flipproof.models import alexnet_227, inception_v3, lenet5, load_weights, resnet18, resnet20, vgg11
from flipproof.models.training import cached, seeded, train_classifier
from flipproof.reports.figures import empty_figure, save
from flipproof.reports.style import SERIES
from flipproof.reports.tradeoff import tradeoff_figure
from flipproof.reproduce.fortune_published import BERS, table_1, table_2
from flipproof.reproduce.published import beside, slug, write_table
from flipproof.spaces.parameters import FaultSpace
from flipproof.storage.explore import WEIGHTS, Exploration, explore, paper_name, short_name
from flipproof.storage.mixed import doubt, explore_mixed

SUMMARY = "FORTUNE: quantised weights with a tripled MSB, memory, time, P_drop and RAP, Tables I and II, figures 5-7"
RATES = {"smoke": (*BERS, 1e-3), "paper": BERS}
TRIALS = {"smoke": 60, "paper": 1000}
MORE = (Affine(bits=5), Affine(bits=4), Affine(bits=3), SECDED(Affine(bits=8)), SECDED(Affine(bits=8), block=64))
"""Beside P-3, P-4, P-5 and the 8-bit baseline: the same widths without protection, and the classical code."""
FORTUNE = TripleMSB(Affine(bits=3))
_NAMES = ("network", "widths", "memory", "golden")
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """One network with its data; `calibration` is for choosing mixed widths."""

    name: str
    build: Callable[[], nn.Module]
    test: Batches
    calibration: Batches


def reproduce(
    *, scale: Literal["smoke", "paper"], data_root: Path, out: Path, workers: int, console: Console
) -> pd.DataFrame:
    """Run it. Interrupted, it resumes from `out`/journals.

    Returns:
        One row a network, stored form and rate.

    Raises:
        DataError: if CIFAR-10 or Fashion-MNIST is not under `data_root`.
        ConfigError: if the scale is unknown.
    """
    if scale not in RATES:
        raise ConfigError(f"scale is 'smoke' or 'paper', got {scale!r}")
    found: dict[str, Exploration] = {}
    mixed: list[pd.DataFrame] = []
    for subject in _subjects(scale, data_root):
        net = subject.build()
        found[subject.name] = explore(
            net,
            subject.test,
            accuracy=0.0,
            drop=1.0,
            bits=(3, 5),
            search="exhaustive",
            faults=BitErrorRate(RATES[scale]),
            formats=MORE,
            where=WEIGHTS,
            trials=TRIALS[scale],
            journal=out / "journals" / slug(subject.name),
            workers=workers,
        )
        console.print(f"[bold]{subject.name}[/]")
        console.print(str(found[subject.name]), markup=False, highlight=False)
        save(tradeoff_figure(found[subject.name]), out / f"figure-5-{slug(subject.name)}.png")
        mixed.append(_mixed(net, subject, scale, out, workers, console))
    write_table(pd.concat(mixed, ignore_index=True), out / "table-3", title="Mixed widths against uniform P-3-bit")
    return _tables(found, out, console)


def _mixed(net: nn.Module, subject: Subject, scale: str, out: Path, workers: int, console: Console) -> pd.DataFrame:
    """Widths chosen layer by layer for the memory of uniform P-3-bit, and both in the same campaign."""
    uniform = FORTUNE
    memory = FaultSpace(net, format=uniform, where=WEIGHTS).bits
    journals = out / "journals" / f"{slug(subject.name)}-mixed"
    chosen = explore_mixed(
        net,
        subject.calibration,
        memory=memory,
        ber=max(RATES[scale]),
        trials=10,
        journal=journals / "costs.jsonl",
        workers=workers,
        progress=False,
    )
    write_table(
        chosen.table, out / f"mixed-{slug(subject.name)}", title=f"{subject.name}: cost of each layer and option"
    )
    campaigns = {
        name: assess(
            net,
            data=subject.test,
            faults=BitErrorRate(RATES[scale]),
            format=format,
            where=WEIGHTS,
            metrics=("accuracy", doubt),
            trials=TRIALS[scale],
            workers=workers,
            journal=journals / f"judged-{name}.jsonl",
        )
        for name, format in (("uniform", uniform), ("mixed", chosen.formats))
    }
    rows = []
    for name, result in campaigns.items():
        part = result.summary[["ber", "accuracy", "accuracy_low", "accuracy_high", "doubt", "doubt_low", "doubt_high"]]
        part = part.assign(network=subject.name, widths=name, golden=result.golden["accuracy"])
        part["memory"] = memory if name == "uniform" else chosen.bits
        rows.append(part)
    table = pd.concat(rows, ignore_index=True)
    ends = {name: float(result.summary["accuracy"].iloc[-1]) for name, result in campaigns.items()}
    console.print(
        f"  at {max(RATES[scale]):g} mixed widths have {ends['mixed']:.3f}, uniform P-3-bit {ends['uniform']:.3f}",
        highlight=False,
    )
    return table[["network", "widths", "memory", "golden", *[c for c in table if c not in _NAMES]]]


def _subjects(scale: str, root: Path) -> list[Subject]:
    if scale == "paper":
        train, test = cifar10(root, "train", batch_size=128), cifar10(root, "test", batch_size=500)
        wide, wide_test = (_enlarged(fashion_mnist(root, part, batch_size=64)) for part in ("train", "test"))
        cifar = (("VGG11", vgg11), ("ResNet18", resnet18), ("Inception", inception_v3))
        return [
            *(Subject(name, partial(_trained, name, build, train, 60), test, train[:8]) for name, build in cifar),
            Subject("AlexNet", partial(_trained, "AlexNet", alexnet_227, wide, 20), wide_test, wide[:8]),
        ]
    train, test = cifar10(root, "train", batch_size=100), cifar10(root, "test", batch_size=125, limit=250)
    narrow = partial(vgg11, batch_norm=True, width=0.25, hidden=(256,))
    clothes = fashion_mnist(root, "train", batch_size=100, limit=20000)
    subjects = [
        Subject("VGG-11 (width ¼)", partial(_trained, "vgg11-quarter", narrow, train, 10), test, train[:3]),
        Subject(
            "LeNet-5 (Fashion-MNIST)", partial(_trained, "lenet5-fashion", lenet5, clothes, 4),
            fashion_mnist(root, "test", batch_size=125, limit=250), clothes[:3],
        ),
    ]  # fmt: skip
    if (checkpoint := next(root.glob("**/resnet20-*.th"), None)) is not None:
        subjects.append(Subject("ResNet-20 (checkpoint)", partial(_loaded, checkpoint), test, train[:2]))
    return subjects


def _enlarged(batches: Batches) -> Batches:
    return [(F.interpolate(images, size=227), labels) for images, labels in batches]


def _loaded(path: Path) -> nn.Module:
    model = resnet20()
    load_weights(model, path)
    return model.eval()


def _trained(name: str, build: Callable[[], nn.Module], train: Batches, epochs: int) -> nn.Module:
    return cached(f"fortune-{slug(name)}-1", seeded(build), lambda model: train_classifier(model, train, epochs=epochs))


def _type(format: str) -> str:
    """What the paper calls it, "8-bit" or "P-3-bit", or the format without its defaults."""
    name = paper_name(format)
    return f"{name}-bit" if name else short_name(format)


def _tables(found: dict[str, Exploration], out: Path, console: Console) -> pd.DataFrame:
    forms: list[pd.DataFrame] = []
    rates: list[pd.DataFrame] = []
    for network, exploration in found.items():
        for table, parts in ((exploration.candidates, forms), (exploration.rates, rates)):
            own = table.copy()
            own.insert(0, "network", network)
            own.insert(1, "type", own["format"].map(_type))
            parts.append(own)
    candidates, summary = pd.concat(forms, ignore_index=True), pd.concat(rates, ignore_index=True)
    plain = candidates[["network", "type", "accuracy"]].copy()
    plain = plain[plain["type"].str.fullmatch(r"\d-bit")]
    write_table(
        beside(plain, table_1(), on=["network", "type"], value="accuracy"),
        out / "table-1", title="Table I: accuracy without faults",
    )  # fmt: skip
    costs = candidates[["network", "type", "memory", "memory_ratio", "time_ratio"]]
    summary = summary.drop(columns=["name", "hardening", "format"]).merge(costs, on=["network", "type"])
    for column in ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"):
        summary[column] *= 100
    names = {"accuracy_drop": "drop", "accuracy_drop_low": "low", "accuracy_drop_high": "high"}
    summary = summary.rename(columns=names)
    summary["rap"] = summary["drop"] * summary["memory_ratio"] * summary["time_ratio"]
    write_table(
        beside(summary, table_2(), on=["network", "type", "ber"], value="drop"),
        out / "table-2", title="Table II: drop in percent, memory in bits, time ÷ 8-bit, P_drop, RAP",
    )  # fmt: skip
    for number, column, label in ((6, "p_drop_published", "P_drop"), (7, "rap", "RAP (percent)")):
        for name, own in summary.groupby("network", sort=False):
            save(_bars(own, column, label), out / f"figure-{number}-{slug(str(name))}.png")
    said = _claims(summary)
    (out / "claims.md").write_text("".join(f"- {sentence}\n" for sentence in said), encoding="utf-8")
    for sentence in said:
        console.print(f"  • {sentence}", markup=False, highlight=False)
    return summary


def _bars(table: pd.DataFrame, column: str, label: str) -> Figure:
    figure, axes = empty_figure()
    types = list(dict.fromkeys(table["type"]))
    for i, name in enumerate(types):
        own = table[table["type"] == name]
        places = [place + (i - len(types) / 2) * 0.1 for place in range(len(own))]
        short = str(name).replace("Affine(bits=8)", "8")
        hatch = "////" if i >= len(SERIES) else ""  # a colour that comes again
        axes.bar(places, own[column], width=0.09, color=SERIES[i % len(SERIES)], label=short, hatch=hatch, ec="w", lw=0)
    first = table[table["type"] == types[0]]
    axes.set_xticks(range(len(first)), [f"{ber:g}" for ber in first["ber"]])
    axes.set_xlabel("bit error rate (flips per stored bit)")
    axes.set_ylabel(label)
    axes.set_yscale("symlog", linthresh=max(float(table[column].abs().max()) * 1e-4, 1e-12))
    figure.legend(loc="outside upper center", fontsize=5.5, frameon=False, ncols=4)
    return figure


def _claims(summary: pd.DataFrame) -> list[str]:
    """What the paper says, held against the table at the two highest rates."""
    said = []
    for network, table in summary.groupby("network", sort=False):
        rows: dict[tuple[Any, ...], tuple[float, float, float]] = {
            (type_, ber): (drop, low, high)
            for type_, ber, drop, low, high in table[["type", "ber", "drop", "low", "high"]].to_numpy().tolist()
        }
        memory = dict(zip(table["type"], table["memory_ratio"], strict=True))
        times = dict(zip(table["type"], table["time_ratio"], strict=True))
        for ber in sorted(set(table["ber"]))[-2:]:
            for other in ("3-bit", "5-bit", "8-bit"):
                (x, x_low, x_high), (y, y_low, y_high) = rows[other, ber], rows["P-3-bit", ber]
                low, high = difference_interval(x, (x_low, x_high), y, (y_low, y_high))
                verdict = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
                said.append(
                    f"{network}: P-3-bit loses less than {other} at {ber:g}: {verdict}, {x - y:+.1f} points "
                    f"[{low:.1f}, {high:.1f}]"
                )
        said.append(
            f"{network}: P-3-bit takes {100 * (1 - memory['P-3-bit']):.1f} % less memory than 8-bit (published 37.5 %) "
            f"and {100 * (times['P-3-bit'] - 1):+.1f} % time, decoding packed words at every use (published < 3 %, "
            f"and up to 192 % in its table)"
        )
    return said
