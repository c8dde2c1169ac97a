"""Memory of a campaign beside the bare forward, in bytes of the model's parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

import flipproof as fp
from benchmarks.measure import Row, Size, memory_can_be_measured, one_thread, peak_bytes
from flipproof.models import digits_cnn, resnet18

FORMATS = {"float32": fp.Float32(), "fixed": fp.FixedPoint()}
FAULTS = {"BER 1e-05": fp.BitErrorRate(1e-5), "one bit flip": fp.RandomBits(1)}
CASES = (("float32", "BER 1e-05"), ("fixed", "BER 1e-05"), ("float32", "one bit flip"), ("fixed", "one bit flip"))


def run(size: Size) -> list[Row]:
    """(Peak memory of `assess` − peak of bare forwards on the same data) ÷ bytes of the parameters."""
    if not memory_can_be_measured():
        return [Row("memory of a campaign", None, note="needs Linux, whose peak of resident memory can be reset")]
    cases = CASES[: size.choose(4, 4, 1)]
    rows = []
    for fmt, faults in cases:
        extra = [_in_a_process(fmt, faults, size) for _ in range(size.choose(3, 1, 1))]
        what = f"ResNet-18, batch 64, {type(FORMATS[fmt]).__name__}, {faults}: extra peak memory ÷ parameters"
        rows.append(Row(what, median(extra), at_most=1.05))
    return rows


def _in_a_process(fmt: str, faults: str, size: Size) -> float:
    """A fresh process a case. Its allocator hands every block above 64 KiB back at once, so that peaks are exact."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", fmt, faults, size.value]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout)["extra"])


def _measure(fmt: str, faults: str, size: Size) -> float:
    with one_thread():
        _campaign(
            digits_cnn().eval(), torch.randn(8, 1, 8, 8), fmt, faults
        )  # imports, kernels, tables: not the model's
        net, images = (
            (digits_cnn().eval(), torch.randn(64, 1, 8, 8))
            if size is Size.SMOKE
            else (resnet18().eval(), torch.randn(64, 3, 32, 32))
        )
        net(images)
        bare = peak_bytes(lambda: net(images))
        campaign = peak_bytes(lambda: _campaign(net, images, fmt, faults))
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    return (campaign - bare) / parameters


def _campaign(net: torch.nn.Module, images: torch.Tensor, fmt: str, faults: str) -> None:
    data = [(images, torch.zeros(len(images), dtype=torch.long))]
    fp.assess(net, data=data, faults=FAULTS[faults], format=FORMATS[fmt], trials=3, progress=False)


if __name__ == "__main__":
    print(json.dumps({"extra": _measure(sys.argv[1], sys.argv[2], Size(sys.argv[3]))}))
