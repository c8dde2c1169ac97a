"""What bounded activations cost: a bounded forward ÷ a plain one, and thresholds found ÷ forwards."""

from __future__ import annotations

import torch
from torch import nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, keep_freed_memory, seconds
from flipproof.datasets import digits
from flipproof.demo import trained_digits_cnn
from flipproof.models import digits_cnn, resnet18
from flipproof.running.evaluation import one_thread

METHODS = {
    "saturate (Ranger)": (fp.Ranger(), 1.05),
    "zero above (Guard)": (fp.Guard(), 1.05),
    "smooth (ProAct)": (fp.ProAct(epochs=1, epochs_last=1, batch_size=8, held_out=0.5), 1.15),
}


def run(size: Size) -> list[Row]:
    """Eager ResNet-18 at batch 64; the search is counted in passes over the calibration data, exactly."""
    torch.manual_seed(0)
    if size is Size.SMOKE:
        net, images, name = digits_cnn().eval(), torch.rand(8, 1, 8, 8), "digits CNN, batch 8"
    else:
        net, images, name = resnet18().eval(), torch.randn(64, 3, 32, 32), "ResNet-18, batch 64"
    data = [(images[:8], torch.arange(8) % 10), (images[:8].flip(0), torch.arange(8) % 10)]
    rows = []
    with one_thread(torch.device("cpu")), torch.no_grad():
        hardened = {
            what: fp.harden(net, method, data=data, progress=False).eval() for what, (method, _) in METHODS.items()
        }
        for kept in ("", ", memory kept"):
            if kept and (size is Size.SMOKE or not keep_freed_memory()):
                break
            for what, safe in hardened.items():
                row = f"{name}: forward with bounds, {what} ÷ plain{kept}"
                rows.append(Row(row, _ratio(net, safe, images, size), at_most=METHODS[what][1]))
    return rows + _searches(size)


def _searches(size: Size) -> list[Row]:
    """What finding the thresholds costs on the digits CNN, in passes over the calibration data."""
    data = digits("train", batch_size=128)[: size.choose(12, 12, 2)]
    quick = {"ProAct.quick()": fp.ProAct.quick(), "FitAct.quick()": fp.FitAct.quick(), "Guard()": fp.Guard()}
    full = {"ProAct()": fp.ProAct(), "FTClipAct()": fp.FTClipAct(bers=(1e-5, 1e-4))}
    rows = []
    for name, method in {**quick, **({} if size is Size.SMOKE else full)}.items():
        report = fp.hardening_report(fp.harden(trained_digits_cnn(), method, data=data, progress=False))
        rows.append(
            Row(f"digits CNN: {name} ÷ one pass over the calibration data, forward-equivalents", report.forwards)
        )
    return rows


def _ratio(net: nn.Module, safe: nn.Module, images: torch.Tensor, size: Size) -> float:
    medians = interleaved(
        {"plain": lambda turn: seconds(lambda: net(images)), "bounded": lambda turn: seconds(lambda: safe(images))},
        size.choose(31, 9, 1),
    )
    return medians["bounded"] / medians["plain"]
