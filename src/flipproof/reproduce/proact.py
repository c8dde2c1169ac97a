"""ProAct (Mousavi et al. 2024): bounded activations compared, tables I–V and figures 2, 3, 5, 6.

`paper` is what was published: AlexNet, VGG-16 and ResNet-50, trained here to the data sets under `data_root`, 500
repetitions. `smoke` is what two cores do in about an hour: ResNet-20 from a public checkpoint if there is one (else a
narrow VGG-11), a VGG-16 of a quarter of the width, shorter training of thresholds, fewer repetitions and images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.console import Console
from torch import Tensor, nn

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.statistics import difference_interval
from flipproof.datasets import cifar10, cifar100
from flipproof.errors import ConfigError, FlipproofWarning
from flipproof.faults import BitErrorRate
from flipproof.formats import FixedPoint
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.ft_clipact import FTClipAct
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.report import hardening_report
from flipproof.models import alexnet, load_weights, resnet20, resnet50, vgg16
from flipproof.models.training import cached, seeded, train_classifier
from flipproof.reports.bounds import distribution_figure, history_figure
from flipproof.reports.figures import metric_figure, save
from flipproof.reports.tables import compare
from flipproof.reproduce.proact_distances import distances
from flipproof.reproduce.proact_memory import memory_table
from flipproof.reproduce.proact_published import table_1, table_2, table_4
from flipproof.reproduce.published import beside, slug, write_table
from flipproof.spaces.sites import Parameters

SUMMARY = "ProAct: Ranger, FT-ClipAct, FitAct, ProAct and Guard under faults, Q15.16, tables I–V and figures 2–7"
FORMAT = FixedPoint(15, 16)
RATES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5)
HIGH = 3e-6
"""From this rate up the methods differ; claims are about the mean accuracy there."""
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """One network with its data."""

    name: str
    build: Callable[[], nn.Module]
    test: Batches
    calibration: Batches


@dataclass(frozen=True)
class Setting:
    """What a scale means."""

    trials: int
    methods: dict[str, Hardening | None]


def reproduce(
    *, scale: Literal["smoke", "paper"], data_root: Path, out: Path, workers: int, console: Console
) -> pd.DataFrame:
    """Run it. Interrupted, it resumes from `out`/journals and `out`/stages.

    Returns:
        One row a network, method and rate: accuracy, its drop and their intervals.

    Raises:
        DataError: if CIFAR-10 (with `paper`, CIFAR-100 too) is not under `data_root`.
        ConfigError: if the scale is unknown.
    """
    if scale not in ("smoke", "paper"):
        raise ConfigError(f"scale is 'smoke' or 'paper', got {scale!r}")
    setting = _setting(scale)
    found: dict[str, dict[str, Assessment]] = {}
    rows: list[dict[str, float | str]] = []
    pairs: list[pd.DataFrame] = []
    for subject in _subjects(scale, data_root):
        model = subject.build()
        console.print(f"[bold]{subject.name}[/]: {sum(p.numel() for p in model.parameters()):,} parameters")
        found[subject.name] = {}
        for method, hardening in setting.methods.items():
            safe = _hardened(model, subject, method, hardening, out, rows)
            result = assess(
                safe,
                data=subject.test,
                faults=BitErrorRate(RATES),
                format=FORMAT,
                trials=setting.trials,
                journal=out / "journals" / f"{slug(subject.name)}-{slug(method)}.jsonl",
                workers=workers,
            )
            found[subject.name][method] = result
            accuracies = ", ".join(f"{value:.1%}" for value in result.summary["accuracy"])
            console.print(f"  {method}: {result.golden['accuracy']:.2%} without faults; {accuracies}", highlight=False)
            if method in ("FitAct", "ProAct"):
                table, l2 = distances(safe, model, subject.test[0], FORMAT)
                rows[-1]["l2"] = l2
                number = {"FitAct": "3", "ProAct": "6"}[method]
                save(distribution_figure(table), out / f"figure-{number}-{slug(subject.name)}.png")
            if not hardening_report(safe).history.empty if hardening else False:
                save(history_figure(hardening_report(safe)), out / f"history-{slug(subject.name)}-{slug(method)}.png")
        save(metric_figure(found[subject.name]), out / f"figure-5-{slug(subject.name)}.png")
        pairs.append(_paired(model, subject, setting, out, workers))
    write_table(
        pd.concat(pairs),
        out / "table-6",
        title="Accuracy gained over ProAct by the same flips",
    )
    return _tables(found, pd.DataFrame(rows), out, console)


def _paired(model: nn.Module, subject: Subject, setting: Setting, out: Path, workers: int) -> pd.DataFrame:
    """Guard, and what else is cheap, against ProAct, trial by trial under the same flips.

    Methods add different thresholds, so their fault spaces differ and their campaigns draw different flips. Here only
    the parameters they share are hit: the draws are equal, and the interval is of paired differences.
    """
    results: dict[str, Assessment] = {}
    for method in ("ProAct", "FitAct", "Ranger (neuron)", "Guard"):
        if (hardening := setting.methods.get(method)) is None:
            continue
        results[slug(method)] = assess(
            _hardened(model, subject, method, hardening, out, []),
            data=subject.test,
            faults=BitErrorRate(RATES),
            format=FORMAT,
            where=Parameters(exclude=["*.threshold", "*.low", "*.rest"]),
            trials=setting.trials,
            journal=out / "journals" / f"{slug(subject.name)}-{slug(method)}-paired.jsonl",
            workers=workers,
        )
    table = compare(**results)
    table = table[table["campaign"] != "proact"]
    table.insert(0, "network", subject.name)
    gains = ["accuracy_gain", "accuracy_gain_low", "accuracy_gain_high"]
    return table[["network", "campaign", "ber", *gains, "paired", "trials"]]


def _setting(scale: str) -> Setting:
    if scale == "paper":
        trained: dict[str, Hardening] = {"FitAct": FitAct(slack=1.0), "ProAct": ProAct(slack=1.0)}
        return Setting(500, {**_closed_forms(), "FT-ClipAct": FTClipAct(trials=50, samples=1000, slack=1.0), **trained})
    search = FTClipAct(points=4, rounds=2, trials=4, samples=100, bers=(1e-6, 1e-5, 3e-5), slack=1.0)
    quick: dict[str, Hardening] = {
        "FitAct": replace(FitAct.quick(), slack=1.0),
        "ProAct": replace(ProAct.quick(), slack=1.0),
    }
    return Setting(60, {**_closed_forms(), "FT-ClipAct": search, **quick})


def _closed_forms() -> dict[str, Hardening | None]:
    """Published methods as published (slack=1.0), ours with its defaults."""
    return {
        "none": None,
        "Ranger (layer)": Ranger(replace="zero", slack=1.0),
        "Ranger (neuron)": Ranger(per="neuron", replace="zero", slack=1.0),
        "Ranger (layer, saturating)": Ranger(slack=1.0),
        "Guard": Guard(),
        "Guard (activations only)": Guard(outputs=False),
    }


def _subjects(scale: str, root: Path) -> list[Subject]:
    if scale == "paper":
        subjects = []
        for data, load, classes in (("CIFAR-10", cifar10, 10), ("CIFAR-100", cifar100, 100)):
            train, test = load(root, "train", batch_size=128), load(root, "test", batch_size=500)
            for name, build in (("AlexNet", alexnet), ("VGG-16", vgg16), ("ResNet-50", resnet50)):
                make = partial(_trained, f"{slug(name)}-{classes}", partial(build, classes), train, 100)
                subjects.append(Subject(f"{name} {data}", make, test, train))
        return subjects
    train, test = cifar10(root, "train", batch_size=100), cifar10(root, "test", batch_size=125, limit=250)
    calibration = train[:10]
    checkpoint = next(root.glob("**/resnet20-*.th"), None)
    narrow = Subject(
        "VGG-16 (width ¼, BN) CIFAR-10",
        partial(_trained, "vgg16-quarter-bn-10", partial(vgg16, batch_norm=True, width=0.25), train, 12),
        test,
        calibration,
    )
    return [narrow] if checkpoint is None else [_from_checkpoint(checkpoint, test, calibration), narrow]


def _from_checkpoint(path: Path, test: Batches, calibration: Batches) -> Subject:
    def build() -> nn.Module:
        model = resnet20()
        load_weights(model, path)
        return model.eval()

    return Subject("ResNet-20 CIFAR-10", build, test, calibration)


def _trained(name: str, build: Callable[[], nn.Module], train: Batches, epochs: int) -> nn.Module:
    return cached(f"reproduce-{name}-1", seeded(build), lambda model: train_classifier(model, train, epochs=epochs))


def _hardened(
    model: nn.Module,
    subject: Subject,
    method: str,
    hardening: Hardening | None,
    out: Path,
    rows: list[dict[str, float | str]],
) -> nn.Module:
    if hardening is None:
        rows.append({"network": subject.name, "method": method, "thresholds": 0, "forwards": 0.0})
        return model
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FlipproofWarning
        )  # rates without a bit to hit; bounds as published cost accuracy
        safe = harden(
            model,
            hardening,
            data=subject.calibration,
            journal=out / "stages" / f"{slug(subject.name)}-{slug(method)}.jsonl",
        )
    report = hardening_report(safe)
    rows.append(
        {
            "network": subject.name,
            "method": method,
            "thresholds": report.thresholds,
            "memory_percent": 100 * report.thresholds / report.parameters,
            "forwards": report.forwards,
        }
    )
    return safe


def _tables(found: dict[str, dict[str, Assessment]], costs: pd.DataFrame, out: Path, console: Console) -> pd.DataFrame:
    accuracy, parts = [], []
    for network, results in found.items():
        base = results["none"].golden["accuracy"]
        accuracy.append({"network": network.split(" ")[0], "data": network.split(" ")[-1], "accuracy": base})
        table = compare(**{slug(method): result for method, result in results.items()})
        for method, result in results.items():
            part = table[table["campaign"] == slug(method)].copy()
            part.insert(0, "network", network)
            part.insert(1, "method", method)
            part["clean_drop"] = base - result.golden["accuracy"]
            for column in ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"):  # against the unprotected net
                part[column] += base - result.golden["accuracy"]
            parts.append(part)
    summary = pd.concat(parts, ignore_index=True)
    columns = ["network", "method", "ber", "accuracy", "accuracy_low", "accuracy_high", "accuracy_drop", "clean_drop"]
    summary = summary[[*columns, "critical_total", "due", "trials"]]
    clean = summary.groupby(["network", "method"], sort=False)["clean_drop"].first().reset_index()
    write_table(
        beside(pd.DataFrame(accuracy), table_1(), on=["network", "data"], value="accuracy"),
        out / "table-1", title="Table I: accuracy without faults",
    )  # fmt: skip
    write_table(
        beside(clean, table_2(), on=["network", "method"], value="clean_drop"),
        out / "table-2", title="Table II: accuracy that a method costs without faults",
    )  # fmt: skip
    write_table(memory_table(), out / "table-3", title="Table III: memory overhead in percent (Eq. 6)")
    write_table(
        beside(summary, table_4(), on=["network", "ber", "method"], value="accuracy_drop"),
        out / "table-4", title="Table IV and Fig. 5: accuracy under faults",
    )  # fmt: skip
    write_table(costs, out / "table-5", title="Cost of each method, and Table V: L2 distance (Eq. 9)")
    for sentence in _claims(summary):
        console.print(f"  • {sentence}", markup=False, highlight=False)
    (out / "claims.md").write_text("".join(f"- {sentence}\n" for sentence in _claims(summary)), encoding="utf-8")
    return summary


def _claims(summary: pd.DataFrame) -> list[str]:
    """The paper's ranking and its clean drop, held against the table: means over the rates from 3e-6 up."""
    order = ("ProAct", "FitAct", "FT-ClipAct", "Ranger (layer)", "none")
    said = []
    for network, table in summary.groupby("network", sort=False):
        high = {str(method): rows for method, rows in table[table["ber"] >= HIGH].groupby("method")}
        for better, worse in [*pairwise(order), ("Guard", "ProAct"), ("Guard", "FitAct")]:
            mean, low, above = _difference(high[better], high[worse])
            verdict = "holds" if low >= 0 else "does not hold" if above < 0 else "cannot be told"
            interval = f"[{100 * low:.1f}, {100 * above:.1f}]"
            said.append(f"{network}: {better} ≥ {worse} {verdict}: {100 * mean:+.1f} points {interval}")
        drop = float(table[table["method"] == "ProAct"]["clean_drop"].iloc[0])
        sign = "<" if drop < 0.01 else "≥"
        said.append(f"{network}: ProAct costs {100 * drop:.2f} points without faults ({sign} 1)")
    return said


def _difference(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float, float]:
    """Mean difference of accuracy over the rates, with the rates' independent intervals added as squares."""
    columns = ["accuracy", "accuracy_low", "accuracy_high"]
    ours, theirs = (table.sort_values("ber")[columns].to_numpy(float).tolist() for table in (one, other))
    parts = [
        (x - y, *difference_interval(x, (x_low, x_high), y, (y_low, y_high)))
        for (x, x_low, x_high), (y, y_low, y_high) in zip(ours, theirs, strict=True)
    ]
    mean = sum(d for d, _, _ in parts) / len(parts)
    below = sum((d - low) ** 2 for d, low, _ in parts) ** 0.5 / len(parts)
    above = sum((high - d) ** 2 for d, _, high in parts) ** 0.5 / len(parts)
    return mean, mean - below, mean + above
