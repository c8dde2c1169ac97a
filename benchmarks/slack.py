"""What bounds at the largest values cost on unseen images, and what slack costs under faults: ResNet-20, CIFAR-10.

``python -m benchmarks.slack --data-root DATA`` (CIFAR-10 and a public `resnet20-*.th`), some minutes on two cores.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import flipproof as fp
from flipproof.datasets import cifar10
from flipproof.hardening.fitting.acceptance import Acceptance
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.report import hardening_report
from flipproof.models import load_weights, resnet20

METHODS: dict[str, Hardening] = {
    "Guard(slack=1.0)": fp.Guard(slack=1.0),
    "Guard()": fp.Guard(),
    "Guard(slack=2.0)": fp.Guard(slack=2.0),
    "Ranger(neuron, zero, slack=1.0)": fp.Ranger(per="neuron", replace="zero", slack=1.0),
    "Ranger(neuron, zero)": fp.Ranger(per="neuron", replace="zero"),
}


def main() -> None:
    """Print one row a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000, help="test images for accuracy without faults")
    parser.add_argument("--faulty-images", type=int, default=250, help="test images under faults")
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args()
    model = resnet20()
    load_weights(model, next(given.data_root.glob("**/resnet20-*.th")))
    model.eval()
    calibration = cifar10(given.data_root, "train", batch_size=100)[:10]
    test = cifar10(given.data_root, "test", batch_size=250, limit=given.images)
    unseen = Calibration.read(model, test, torch.device("cpu"))
    faults = fp.BitErrorRate([1e-6, 1e-5])
    rows = [_row("none", model, None, unseen, test, faults, given)]
    for name, method in METHODS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fp.FlipproofWarning)  # that slack=1.0 costs accuracy is what is shown
            safe = harden(model, method, data=calibration, progress=False)
        rows.append(_row(name, safe, hardening_report(safe).slack, unseen, test, faults, given))
        print(pd.DataFrame(rows).to_string(index=False), flush=True)


def _row(
    name: str,
    model: nn.Module,
    slack: float | None,
    unseen: Calibration,
    test: list[tuple[torch.Tensor, torch.Tensor]],
    faults: fp.BitErrorRate,
    given: argparse.Namespace,
) -> dict[str, object]:
    judged = Acceptance.of(unseen, model)
    found = fp.assess(
        model,
        data=[(x[: given.faulty_images], y[: given.faulty_images]) for x, y in test[:1]],
        faults=faults,
        format=fp.FixedPoint(15, 16),
        trials=given.trials,
        progress=False,
    ).summary
    report = vars(model).get("_flipproof_hardening")
    held = report.judged if report is not None else None
    row: dict[str, object] = {
        "method": name,
        "slack": slack,
        "reported drop": None
        if held is None
        else f"{100 * held.drop:.2f} [{100 * held.low:.2f}, {100 * held.high:.2f}]",
        "disturbed": None if held is None else f"{held.disturbed}/{held.samples}",
        "unseen drop": f"{100 * judged.drop:.2f} [{100 * judged.low:.2f}, {100 * judged.high:.2f}]",
    }
    for ber, mean, low, high in zip(
        found["ber"], found["accuracy"], found["accuracy_low"], found["accuracy_high"], strict=True
    ):
        row[f"at {ber:g}"] = f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return row


if __name__ == "__main__":
    main()
