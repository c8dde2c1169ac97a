"""WBC and AVC for LSTM networks (Parchekani et al. 2024): Table I and figures 2–8.

The paper's data, MIMIC-III, is credentialed. A user's own benchmark folder is taken where there is one; else the open
PhysioNet 2012 records; else made-up stays, so that the code runs everywhere. `paper` is 1000 repetitions over the whole
test set; `smoke` is what two cores do in about an hour.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from rich.console import Console
from torch import nn

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.statistics import difference_interval
from flipproof.datasets.ehr import EHRData, EHRSet, mimic3, physionet2012, synthetic_ehr
from flipproof.errors import ConfigError, FlipproofWarning
from flipproof.faults import BitErrorRate, BitPosition
from flipproof.formats import BitClipped, Float32, Format
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.avc import AVC
from flipproof.models import stage_72, stage_384, stage_conv_72, stage_conv_384
from flipproof.models.stagenet import StageNet
from flipproof.models.training import cached, risk_loss, seeded, train_classifier
from flipproof.reports.bits import profile_figure
from flipproof.reports.figures import bit_figure, metric_figure, outcome_figure, save
from flipproof.reports.tables import compare
from flipproof.reproduce.lstm_published import NETWORKS, REDUCTION, WBC_OVER_AVC, critical_totals, table_1
from flipproof.reproduce.published import beside, write_table
from flipproof.spaces.sites import Parameters
from flipproof.storage.clipping import bit_profile, choose_clipping

SUMMARY = "WBC and AVC for LSTM networks: StageNet on clinical timelines, Table I and figures 2–8"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHTS = Parameters(exclude="*bias*")
"""The paper's fault space, weights; the bounds that AVC stores are in it too."""
METHODS = ("none", "WBC", "AVC", "WBC + AVC")
SCALES = {"smoke": (60, 240), "paper": (1000, None)}
"""Trials a rate, and test stays."""
BUILD = (stage_conv_384, stage_conv_72, stage_384, stage_72)


def reproduce(
    *, scale: Literal["smoke", "paper"], data_root: Path, out: Path, workers: int, console: Console
) -> pd.DataFrame:
    """Run it. Interrupted, it resumes from `out`/journals.

    Returns:
        One row a network, method and rate: accuracy, AUROC, their drops, outcome rates.

    Raises:
        ConfigError: if the scale is unknown.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale is 'smoke' or 'paper', got {scale!r}")
    source, data = clinical(data_root)
    counts = f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test stays"
    console.print(f"{source}: {counts}", highlight=False)
    trials, judged = SCALES[scale]
    test = EHRSet(data.test.stays[:judged]).batches(120)
    # several batches: labelled steps of a stay belong together, so harden holds whole batches back
    calibration = data.validation.batches(max(1, min(200, len(data.validation) // 8)))
    few = EHRSet(data.validation.stays[:100]).batches(100)
    found: dict[str, dict[str, Assessment]] = {}
    sizes: list[dict[str, float | str]] = []
    profiles: dict[str, pd.Series] = {}
    chosen: dict[str, str] = {}
    for name, build in zip(NETWORKS, BUILD, strict=True):
        net = _trained(name, build, source, data)
        whole = assess(net, data=data.test.batches(200), faults=BitErrorRate(0.0), metrics=("accuracy", "auroc"))
        sizes.append({"network": name, **whole.golden, **net.weight_counts()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlipproofWarning)  # which bit is worse and not constant goes into a table
            wbc = choose_clipping(net, few, where=WEIGHTS, metrics=("auroc",), trials=8)
            safe = harden(net, AVC(slack=1.0), data=calibration)  # as published; what it costs is in the tables
        assert isinstance(wbc, BitClipped)  # per="model"
        profiles[name], chosen[name] = bit_profile(net, Float32(), where=WEIGHTS), repr(wbc)
        console.print(f"[bold]{name}[/]: AUROC {whole.golden['auroc']:.3f}, clips {wbc!r}", highlight=False)
        found[name] = {}
        for method in METHODS:
            model: nn.Module = safe if "AVC" in method else net
            # bounds are not weights: one of 2.0 or more has bit 30 set, and clipping would destroy it
            format: Format | dict[str, Format] = Float32()
            if "WBC" in method:
                format = {"*.threshold": Float32(), "*.low": Float32(), "*": wbc} if "AVC" in method else wbc
            run = partial(assess, model, data=test, format=format, where=WEIGHTS, workers=workers)
            journal = out / "journals" / f"{name}-{method.replace(' ', '')}.jsonl"
            result = run(faults=BitErrorRate(RATES), metrics=("accuracy", "auroc"), trials=trials, journal=journal)
            found[name][method] = result
            last = result.summary.iloc[-1]
            console.print(
                f"  {method}: at 1e-2 AUROC {last['auroc']:.3f}, critical + DUE {last['critical_total']:.2%}, "
                f"DUE {last['due']:.2%}",
                highlight=False,
            )
        bits = out / "journals" / f"{name}-bits.jsonl"
        by_bit = assess(
            net, data=test, faults=BitPosition(range(32)), where=WEIGHTS, metrics=("accuracy", "auroc"), journal=bits
        )
        save(bit_figure(by_bit), out / f"figure-5-{name}.png")
        write_table(_bit_table(by_bit, profiles[name]), out / f"bits-{name}", title=f"{name}: each bit in all weights")
    save(profile_figure(profiles), out / "figure-4.png")
    _figures(found, out)
    return _tables(found, pd.DataFrame(sizes), chosen, source, out, console)


def clinical(root: Path) -> tuple[str, EHRData]:
    """The best data under a folder: a MIMIC-III benchmark, else PhysioNet 2012, else none of anybody's."""
    if (found := next(root.glob("**/train_listfile.csv"), None)) is not None:
        return "MIMIC-III decompensation", mimic3(found.parent)
    if (found := next(root.glob("**/Outcomes-a.txt"), None)) is not None:
        return "PhysioNet 2012", physionet2012(found.parent)
    return "made-up stays", synthetic_ehr(600)


def _trained(name: str, build: Callable[[], StageNet], source: str, data: EHRData) -> StageNet:
    def train(model: nn.Module) -> nn.Module:
        batches = data.train.batches(64, shuffle=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout
            return train_classifier(model, batches, epochs=4 if "384" in name else 8, loss=risk_loss)

    key = f"reproduce-{name}-{source.split()[0]}-{len(data.train)}-1".lower()
    model = cached(key, seeded(build), train)
    assert isinstance(model, StageNet)
    return model


def _bit_table(by_bit: Assessment, profile: pd.Series) -> pd.DataFrame:
    table = by_bit.summary[["bit", "accuracy_drop", "auroc_drop", "critical_sdc", "due", "critical_total"]].copy()
    table.insert(1, "mean", profile.to_numpy())
    return table


def _figures(found: dict[str, dict[str, Assessment]], out: Path) -> None:
    numbers = {"none": "2", "WBC": "6", "AVC": "7"}
    for method, number in numbers.items():
        results = {network: methods[method] for network, methods in found.items()}
        for letter, metric in (("a", "accuracy"), ("b", "auroc")):
            save(metric_figure(results, metric=metric), out / f"figure-{number}{letter}.png")
    for network, methods in found.items():
        save(outcome_figure(methods["none"]), out / f"figure-3-{network}.png")
        save(metric_figure(methods, metric="auroc"), out / f"figure-8-{network}.png")


def _tables(
    found: dict[str, dict[str, Assessment]],
    sizes: pd.DataFrame,
    chosen: dict[str, str],
    source: str,
    out: Path,
    console: Console,
) -> pd.DataFrame:
    parts = []
    for network, methods in found.items():
        for method, result in methods.items():
            part = result.summary.copy()
            part.insert(0, "network", network)
            part.insert(1, "method", method)
            parts.append(part)
    summary = pd.concat(parts, ignore_index=True)
    rates = [f"{outcome}{end}" for outcome in ("critical_total", "due") for end in ("", "_low", "_high")]
    drops = [f"{metric}_drop{end}" for metric in ("accuracy", "auroc") for end in ("", "_low", "_high")]
    summary = summary[["network", "method", "ber", *drops, *rates, "masked", "trials"]]
    write_table(
        beside(
            sizes.melt("network", var_name="quantity", value_name="value"), table_1(),
            on=["network", "quantity"], value="value",
        ),
        out / "table-1", title=f"Table I: networks without faults, ours on {source}",
    )  # fmt: skip
    write_table(
        beside(summary, critical_totals(), on=["network", "method", "ber"], value="critical_total"),
        out / "table-2", title="Figs. 2, 3, 6, 7: drops (fractions), critical SDC + DUE beside the published ones",
    )  # fmt: skip
    write_table(
        _paired(found), out / "table-3", title="Against no protection, by the same flips where spaces are equal"
    )
    said = _claims(summary, chosen)
    (out / "claims.md").write_text("".join(f"- {sentence}\n" for sentence in said), encoding="utf-8")
    for sentence in said:
        console.print(f"  • {sentence}", markup=False, highlight=False)
    return summary


def _paired(found: dict[str, dict[str, Assessment]]) -> pd.DataFrame:
    parts = []
    for network, methods in found.items():
        table = compare(**{method.replace(" + ", "_and_"): result for method, result in methods.items()})
        table = table[table["campaign"] != "none"]
        table.insert(0, "network", network)
        parts.append(table[["network", "campaign", "ber", "auroc_gain", "auroc_gain_low", "auroc_gain_high", "paired"]])
    return pd.concat(parts, ignore_index=True)


def _claims(summary: pd.DataFrame, chosen: dict[str, str]) -> list[str]:
    """What the paper says, held against the table at BER 1e-2."""
    top = summary[summary["ber"] == max(RATES)].set_index(["network", "method"])
    clipped = [network for network, format in chosen.items() if "zeros=(30,)" in format]
    critical: dict[Any, float] = top["critical_total"].to_dict()
    said = [f"bit 30 is the critical bit: chosen for {len(clipped)} of {len(chosen)} networks ({', '.join(clipped)})"]
    for method in METHODS[1:]:
        due = summary[summary["method"] == method].groupby("network", sort=False)["due"].max()
        left = ", ".join(f"{network} {share:.2%}" for network, share in due.items() if share > 0)
        said.append(f"{method} removes every DUE: " + ("holds" if not left else f"does not hold ({left} at worst)"))
    for conv, plain in (("Stage-CONV-384", "Stage-384"), ("Stage-CONV-72", "Stage-72")):
        claim = f"{conv} is more resilient than {plain}"
        said.append(_difference(top, (plain, "none"), (conv, "none"), "critical_total", claim))
    for network, ratio in zip(NETWORKS, WBC_OVER_AVC, strict=True):
        claim = f"{network}: WBC loses less AUROC than AVC (published ratio of drops {ratio:.2f})"
        said.append(_difference(top, (network, "AVC"), (network, "WBC"), "auroc_drop", claim))
        claim = f"{network}: both together lose less than WBC"
        said.append(_difference(top, (network, "WBC"), (network, "WBC + AVC"), "auroc_drop", claim))
    for method, published in REDUCTION.items():
        rates = [(n, critical[n, "none"], critical[n, method]) for n in NETWORKS]
        listed = ", ".join(f"{n} {before / after:.3g}×" if after else f"{n} to none" for n, before, after in rates)
        said.append(f"{method} reduces critical SDC + DUE at 1e-2: {listed}; published up to {published}×")
    return said


def _difference(table: pd.DataFrame, worse: tuple[str, str], better: tuple[str, str], column: str, claim: str) -> str:
    columns: list[dict[Any, float]] = [table[f"{column}{end}"].to_dict() for end in ("", "_low", "_high")]
    (x, x_low, x_high), (y, y_low, y_high) = ([values[key] for values in columns] for key in (worse, better))
    low, high = difference_interval(x, (x_low, x_high), y, (y_low, y_high))
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
    return f"{claim}: {verdict}, by {100 * (x - y):+.1f} points [{100 * low:.1f}, {100 * high:.1f}] of {column}"
