"""Weight bit clipping and activation value clipping where the LSTM paper did not try them: GRU, ResNet, Transformer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.datasets import cifar10
from flipproof.datasets.ehr import EHRSet
from flipproof.datasets.text import sst2
from flipproof.errors import ConfigError, FlipproofWarning
from flipproof.faults import BitErrorRate
from flipproof.formats import BitClipped, Float32, Format
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.avc import AVC
from flipproof.hardening.report import hardening_report
from flipproof.models.training import Loss, cached, risk_loss, seeded, train_classifier
from flipproof.reports.bits import profile_figure
from flipproof.reports.figures import metric_figure, save
from flipproof.reports.tables import compare
from flipproof.reproduce.lstm_clipping import METHODS, clinical
from flipproof.reproduce.published import write_table
from flipproof.storage.clipping import bit_profile, choose_clipping

SUMMARY = "WBC and AVC beyond LSTMs: GRU on clinical timelines, ResNet-18 on CIFAR-10, Transformer on SST-2"
RATES = (1e-6, 1e-5, 1e-4, 1e-3)
SCALES = {"smoke": (40, 240), "paper": (500, None)}
"""Trials a rate, and test samples."""


class GRURisk(nn.Module):
    """A GRU over hourly timelines with a risk at the steps asked for; takes StageNet's arguments."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(93, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 1)
        self.risk = nn.Sigmoid()

    def forward(self, x: Tensor, at: Tensor, delta: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Risks (number of `at`,)."""
        risk: Tensor = self.risk(self.output(self.gru(x)[0])).squeeze(-1)
        return risk[at]


class SentenceEncoder(nn.Module):
    """Two Transformer encoder layers over embedded words, their mean, and two classes."""

    def __init__(self, words: int = 5000, length: int = 32, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.place = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classes = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (N, 2) of word numbers (N, T)."""
        padding = words == 0
        x = self.encoder(self.embed(words) + self.place, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        logits: Tensor = self.classes((x * kept).sum(dim=1) / kept.sum(dim=1))
        return logits


@dataclass(frozen=True)
class Subject:
    """A network and its data."""

    name: str
    build: Callable[[], nn.Module]
    train: Sequence[Any]
    calibration: Sequence[Any]
    test: Sequence[Any]
    metric: str
    epochs: int
    loss: Loss = F.cross_entropy


def reproduce(
    *, scale: Literal["smoke", "paper"], data_root: Path, out: Path, workers: int, console: Console
) -> pd.DataFrame:
    """Run it. Interrupted, it resumes from `out`/journals.

    Returns:
        One row a network, method and rate.

    Raises:
        DataError: if CIFAR-10 or SST-2 is not under `data_root`.
        ConfigError: if the scale is unknown.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale is 'smoke' or 'paper', got {scale!r}")
    trials, judged = SCALES[scale]
    parts: list[pd.DataFrame] = []
    bits: list[dict[str, object]] = []
    profiles: dict[str, pd.Series] = {}
    for subject in _subjects(data_root, judged):
        net = _trained(subject)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlipproofWarning)  # what stays unprotected goes into a table
            wbc = choose_clipping(net, subject.calibration[:1], per="tensor", metrics=(subject.metric,), trials=8)
            safe = harden(net, AVC(), data=subject.calibration)
        assert isinstance(wbc, dict)  # per="tensor"
        profiles[subject.name] = bit_profile(net, Float32())
        bits.append({"network": subject.name, **_protection(net, safe, wbc, profiles[subject.name])})
        found: dict[str, Assessment] = {}
        for method in METHODS:
            found[method] = assess(
                safe if "AVC" in method else net,
                data=subject.test,
                faults=BitErrorRate(RATES),
                format=wbc if "WBC" in method else Float32(),  # AVC's bounds: in their own type
                metrics=(subject.metric,),
                trials=trials,
                workers=workers,
                journal=out / "journals" / f"{subject.name}-{method.replace(' ', '')}.jsonl",
            )
            values = ", ".join(f"{value:.3f}" for value in found[method].summary[subject.metric])
            golden = found[method].golden[subject.metric]
            console.print(f"{subject.name}, {method}: {golden:.3f} without faults; {values}", highlight=False)
        save(metric_figure(found), out / f"{subject.name}.png")
        parts.append(_rows(subject, found))
    save(profile_figure(profiles), out / "bits.png")
    summary = pd.concat(parts, ignore_index=True)
    write_table(summary, out / "table", title="WBC and AVC on other networks")
    write_table(pd.DataFrame(bits), out / "protection", title="What each method can protect")
    return summary


def _subjects(root: Path, judged: int | None) -> list[Subject]:
    _, data = clinical(root)
    images, test = cifar10(root, "train", batch_size=100), cifar10(root, "test", batch_size=120, limit=judged)
    sentences, dev = sst2(root, limit=30000, batch_size=120)
    stays = EHRSet(data.test.stays[:judged]).batches(120)
    dev = dev if judged is None else dev[: judged // 120]
    # two batches at least: labelled steps of a stay belong together, so harden holds whole batches back
    validation = data.validation.batches(max(1, min(200, len(data.validation) // 2)))
    return [
        Subject(
            "GRU", GRURisk, data.train.batches(64, shuffle=True), validation, stays,
            "auroc", 10, risk_loss,
        ),
        Subject("ResNet-18", _resnet18, images, images[:10], test, "accuracy", 8),
        Subject("Transformer", SentenceEncoder, sentences, sentences[:10], dev, "accuracy", 3),
    ]  # fmt: skip


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18  # an extra: nothing else here needs it

    net: nn.Module = resnet18(num_classes=10)
    return net


def _trained(subject: Subject) -> nn.Module:
    def train(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout
            return train_classifier(model, subject.train, epochs=subject.epochs, loss=subject.loss)

    return cached(f"beyond-{subject.name}-{len(subject.train)}-1".lower(), seeded(subject.build), train)


def _protection(net: nn.Module, safe: nn.Module, wbc: dict[str, Format], profile: pd.Series) -> dict[str, object]:
    """What WBC finds to clip and AVC to bound."""
    values = {name: parameter.numel() for name, parameter in net.named_parameters()}
    clipped = {name: format for name, format in wbc.items() if isinstance(format, BitClipped)}
    report = hardening_report(safe)
    return {
        "constant bits": " ".join(str(bit) for bit, mean in profile.items() if mean in (0.0, 1.0)) or "none",
        "clipped": " ".join(sorted({str((*f.zeros, *f.ones)) for f in clipped.values()})),
        "tensors clipped": f"{len(clipped)} of {len(wbc)}",
        "share of values clipped": sum(values[name] for name in clipped) / sum(values[name] for name in wbc),
        "activations clamped": len(report.sites),
        "out of AVC's reach": "; ".join(entry.name for entry in report.unreachable) or "none",
    }


def _rows(subject: Subject, found: dict[str, Assessment]) -> pd.DataFrame:
    gains = compare(**{method.replace(" + ", "_and_"): result for method, result in found.items()})
    parts = []
    for method, result in found.items():
        part = result.summary[["ber"]].copy()
        part.insert(0, "network", subject.name)
        part.insert(1, "method", method)
        part.insert(2, "metric", subject.metric)
        for end in ("", "_low", "_high"):
            part[f"drop{end}"] = result.summary[f"{subject.metric}_drop{end}"]
        part["critical_total"], part["due"] = result.summary["critical_total"], result.summary["due"]
        own = gains[gains["campaign"] == method.replace(" + ", "_and_")]
        for end in ("", "_low", "_high"):
            column = f"{subject.metric}_gain{end}"
            part[f"gain{end}"] = own[column].to_numpy() if method != "none" else float("nan")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
