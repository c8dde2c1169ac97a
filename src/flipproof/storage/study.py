"""One exploration's campaigns: stored forms assessed on the same data, at the same rates, with the same seed."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.errors import FormatError
from flipproof.faults import BitErrorRate, FaultModel
from flipproof.formats import Affine, Format
from flipproof.hardening.overhead import devices_of, wait_for
from flipproof.running.data import Output, call, read_batches
from flipproof.running.evaluation import eval_mode, one_thread
from flipproof.running.outcomes import DecisionChoice
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.storage.indicators import p_drop
from flipproof.storage.pack import pack_

BASELINE = Affine(bits=8)
"""What memory and time are relative to, as in the paper: unprotected 8 bits."""

WEIGHTS = Parameters(kinds=("weight",))
"""FORTUNE's view of memory: the weights and nothing else. Biases, norms and the bounds of hardenings are not in it."""


@dataclass
class Study:
    """All candidates share data, rates, seed and therefore, where their spaces are equal, draws."""

    model: nn.Module
    data: list[Any]
    faults: FaultModel
    accuracy: float
    drop: float
    trials: int
    margin: float | None
    seed: int
    journal: Path | None
    workers: int
    output: Output
    device: str | torch.device | None
    progress: bool | None
    where: Parameters = WEIGHTS
    decision: DecisionChoice = None
    rows: list[dict[str, object]] = field(default_factory=list)
    rates: list[pd.DataFrame] = field(default_factory=list)
    assessments: dict[str, Assessment] = field(default_factory=dict)

    def try_(
        self, format: Format, *, hardening: str = "none", model: nn.Module | None = None, full: bool = False
    ) -> bool:
        """Assess one stored form and note it; True if it is feasible.

        `full` injects below the accuracy threshold too.
        """
        net = self.model if model is None else model
        name = f"{hardening}/{format!r}" if hardening != "none" else repr(format)
        if name in self.assessments:
            return bool(next(row["feasible"] for row in self.rows if row["name"] == name))
        space = FaultSpace(net, format=format, where=self.where)
        golden = self._assess(net, format, BitErrorRate(0.0), None).golden["accuracy"]
        row: dict[str, object] = {
            **{"name": name, "hardening": hardening, "format": repr(format), "width": format.width},
            **{"weights": sum(site.values for site in space.sites), "memory": space.bits},
            **{"coverage": space.coverage, "accuracy": golden},
            **{
                "time_ratio": self._time_ratio(net, format),
                "drop": float("nan"),
                "drop_low": float("nan"),
                "drop_high": float("nan"),
            },
        }
        enough = golden >= self.accuracy
        if enough or full:
            found = self._assess(net, format, self.faults, name)
            self.assessments[name] = found
            worst = int(found.summary["accuracy_drop"].to_numpy().argmax())
            row |= {f"drop{end}": found.summary[f"accuracy_drop{end}"].tolist()[worst] for end in ("", "_low", "_high")}
            self.rates.append(self._rates(name, hardening, format, space.bits, found))
        row["feasible"] = feasible = bool(enough and float(str(row["drop"])) <= self.drop)
        self.rows.append(row)
        return feasible

    def _assess(self, net: nn.Module, format: Format, faults: FaultModel, name: str | None) -> Assessment:
        return assess(
            net,
            data=self.data,
            faults=faults,
            format=format,
            where=self.where,
            trials=self.trials,
            margin=self.margin if name else None,
            seed=self.seed,
            journal=self.journal / f"{slug(name)}.jsonl" if self.journal is not None and name else None,
            workers=self.workers if name else 1,
            output=self.output,
            decision=self.decision,
            device=self.device,
            progress=self.progress if name else False,
        )

    def _time_ratio(self, net: nn.Module, format: Format) -> float:
        """A forward of the model in packed words, decoded at use ÷ the same with unprotected 8 bits, in turn.

        NaN where `pack_` cannot pack the model (tied parameters).
        """
        device = next((t.device for t in net.parameters()), torch.device("cpu"))
        inputs = read_batches(self.data[:1], device).inputs[0]
        try:
            pairs = ((net, format), (self.model, BASELINE))
            both = [pack_(deepcopy(model), held, where=self.where) for model, held in pairs]
        except FormatError:
            return float("nan")
        seconds: list[list[float]] = [[], []]
        devices = devices_of(*both, inputs)
        with one_thread(device), torch.no_grad():
            for _ in range(9):
                for model, taken in zip(both, seconds, strict=True):
                    with eval_mode(model):
                        wait_for(devices)
                        began = time.perf_counter()
                        call(model, inputs)
                        wait_for(devices)
                        taken.append(time.perf_counter() - began)
        ours, theirs = (sorted(taken)[len(taken) // 2] for taken in seconds)
        return ours / theirs

    def _rates(self, name: str, hardening: str, format: Format, bits: int, found: Assessment) -> pd.DataFrame:
        columns = ["ber", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high", "critical_total", "due", "trials"]
        table = found.summary[[column for column in columns if column in found.summary]].copy()
        drops = (100 * table["accuracy_drop"]).tolist()
        for column, used in (("p_drop", drops), ("p_drop_published", [drops[-1]] * len(drops))):
            table[column] = [
                p_drop(parameters=bits, width=1, ber=float(ber), accuracy_drop=float(value))
                for ber, value in zip(table["ber"], used, strict=True)
            ]
        table.insert(0, "name", name)
        table.insert(1, "hardening", hardening)
        table.insert(2, "format", repr(format))
        return table


def slug(name: str) -> str:
    """A name as part of a file name."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in kept.split("-") if part)
