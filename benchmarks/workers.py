"""What a second worker process is worth, beside what the machine gives two processes that share nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, one_thread, seconds
from benchmarks.throughput import NAMES
from flipproof.models import digits_cnn, resnet18


def run(size: Size) -> list[Row]:
    """Throughput of 2 workers ÷ 1, whole calls of `assess`, golden run and start of the processes included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2 or sys.platform != "linux":
        return [Row("2 workers ÷ 1", None, note=f"needs Linux and two cores; this is {sys.platform} with {cores}")]
    torch.manual_seed(0)
    if size is Size.SMOKE:
        net, images = digits_cnn().eval(), torch.randn(4, 1, 8, 8)
    else:
        net, images = resnet18().eval(), torch.randn(8, 3, 32, 32)
    trials, forwards = size.choose(120, 30, 4), size.choose(60, 15, 2)
    with one_thread():
        found = interleaved(
            {
                "1 worker": partial(_campaign, net, images, trials, 1),
                "2 workers": partial(_campaign, net, images, trials, 2),
                "1 process": partial(_bare, net, images, forwards, 1),
                "2 processes": partial(_bare, net, images, forwards, 2),
            },
            size.choose(5, 2, 1),
        )
    name = f"{NAMES[type(net)]}, batch {len(images)}"
    machine = 2 * found["1 process"] / found["2 processes"]
    campaign = found["1 worker"] / found["2 workers"]
    return [
        Row(f"{name}, {trials} trials at BER 1e-05: throughput of 2 workers ÷ 1", campaign, at_least=1.8),
        Row(f"{name}, bare forwards: 2 separate processes ÷ 1 (what the machine gives)", machine),
        Row(f"{name}: the campaign's share of what the machine gives", campaign / machine, percent=True),
    ]


def _campaign(net: nn.Module, images: Tensor, trials: int, workers: int, turn: int) -> float:
    data = [(images, torch.zeros(len(images), dtype=torch.long))]
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        return seconds(
            lambda: fp.assess(
                net,
                data=data,
                faults=fp.BitErrorRate(1e-5),
                trials=trials,
                journal=journal,
                workers=workers,
                progress=False,
            )
        )


def _bare(net: nn.Module, images: Tensor, forwards: int, processes: int, turn: int) -> float:
    """Each process runs all the forwards: twice the work with two of them."""
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_forwards, args=(net, images, forwards)) for _ in range(processes)]

    def together() -> None:
        for process in started:
            process.start()
        for process in started:
            process.join()

    return seconds(together)


def _forwards(net: nn.Module, images: Tensor, count: int) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(count):
            net(images)
