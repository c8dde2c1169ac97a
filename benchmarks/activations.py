"""What bounds behind layers and searched thresholds buy under faults, and what a search costs: ResNet-20, CIFAR-10.

``python -m benchmarks.activations --data-root DATA --out runs`` (CIFAR-10 and a public `resnet20-*.th`). The
checkpoint knows its training images by heart, so calibration takes the first test images, and accuracy the ones behind
them. An hour on an idle core for all rows; finished trials and layers in ``--out`` are not computed again.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import flipproof as fp
from flipproof.campaigns.statistics import wilson_interval
from flipproof.datasets import cifar10
from flipproof.hardening.fitting.acceptance import Acceptance
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.methods.base import Hardening
from flipproof.models import load_weights, resnet20
from flipproof.running.evaluation import one_thread

METHODS: dict[str, Hardening | None] = {
    "none": None,
    "Guard()": fp.Guard(),
    "Fence()": fp.Fence(),
    'Fence(replace="bound")': fp.Fence(replace="bound"),
    "ProAct.quick()": fp.ProAct.quick(),
    "ProAct.searched()": fp.ProAct.searched(),
    'ProAct.searched("channel")': fp.ProAct.searched("channel"),
    'ProAct.searched("neuron")': fp.ProAct.searched("neuron"),
    "FitAct.searched()": fp.FitAct.searched(),
}
BATCH, ASIDE, CLEAN = 250, 2000, 2000
"""The first `ASIDE` test images are for calibration, the next `CLEAN` for accuracy."""


def main() -> None:
    """Print one row a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="for journals")
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="names of methods")
    parser.add_argument("--calibration", type=int, default=ASIDE, help="images of the first 2,000")
    parser.add_argument("--images", type=int, default=1000, help="under faults, a multiple of 250")
    parser.add_argument("--trials", type=int, default=20, help="a rate")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = resnet20()
    load_weights(model, next(given.data_root.glob("**/resnet20-*.th")))
    model.eval()
    test = cifar10(given.data_root, "test", batch_size=BATCH, limit=ASIDE + CLEAN)
    calibration, unseen = test[: given.calibration // BATCH], test[ASIDE // BATCH :]
    clean = Calibration.read(model, unseen, torch.device("cpu"))
    for name in given.only:
        method = METHODS[name]
        stem = "".join(c for c in name if c.isalnum())
        safe: nn.Module = model
        cost = ""
        if method is not None:
            with warnings.catch_warnings(), one_thread(torch.device("cpu")):
                warnings.simplefilter("ignore", fp.FlipproofWarning)  # a loss on the held-out samples is shown below
                before = _forward_seconds(model, calibration)
                safe = fp.harden(model, calibration, method, journal=given.out / f"{stem}-stages.jsonl", progress=False)
                bare = (before + _forward_seconds(model, calibration)) / 2
            report = fp.hardening_report(safe)
            cost = f"slack {report.slack} | {report.seconds / bare:.0f} × | {report.forwards:.1f} passes"
            cost += f" | {report.thresholds:,} thresholds"
            if "scale" in report.history:
                scales = report.history.loc[report.history["accepted"], "scale"]
                cost += f" | α {scales.min():.2f} to {scales.max():.2f}, median {scales.median():.2f} ({len(scales)})"
        judged = Acceptance.of(clean, safe)
        right = judged.right - judged.lost + judged.won
        low, high = wilson_interval(right, judged.samples)
        found = fp.assess(
            safe,
            data=unseen[: given.images // BATCH],
            faults=fp.BitErrorRate([1e-5, 3e-5]),
            format=fp.FixedPoint(),
            trials=given.trials,
            journal=given.out / f"{stem}.jsonl",
            progress=False,
        ).summary
        cells = [
            name,
            f"{_points(right / judged.samples, low, high)} (drop {_points(judged.drop, judged.low, judged.high)})",
            *map(_points, found["accuracy"], found["accuracy_low"], found["accuracy_high"]),
            f"{100 * found['accuracy'].mean():.1f}",
            cost,
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _points(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _forward_seconds(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Wall seconds of a bare pass, as the report's are."""
    began = time.perf_counter()
    with torch.no_grad():
        for inputs, _ in data:
            model(inputs)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
