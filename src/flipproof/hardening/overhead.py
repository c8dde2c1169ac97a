"""What a hardening costs: memory (ProAct, Eq. 6) and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipproof._interrupts import given_back
from flipproof.errors import ConfigError
from flipproof.hardening._example_inputs import inputs_like
from flipproof.hardening.report import REPORT, HardeningReport
from flipproof.running.data import call
from flipproof.running.evaluation import eval_mode


@dataclass(frozen=True)
class Overhead:
    """Cost of a hardened model against the original.

    Attributes:
        parameters: of the original model, each counted once.
        thresholds: values that the hardened model stores beyond those.
        memory_percent: Eq. (6), 100 · thresholds / parameters.
        bytes: of the thresholds, in their own float type.
        time_ratio: forward pass of the hardened model ÷ of the original, medians of interleaved runs; None without
            inputs to run.
    """

    parameters: int
    thresholds: int
    memory_percent: float
    bytes: int
    time_ratio: float | None


def overhead(model: nn.Module, hardened: nn.Module, *, inputs: Any = None, repeats: int = 11) -> Overhead:
    """Memory and time that a hardening costs.

    Memory overhead is Eq. (6) of ProAct, in percent: stored thresholds over parameters. Time is measured in eval mode
    on `inputs`, one model after the other in turn, so that both see the same machine.

    Args:
        model: the original.
        hardened: what `harden` made of it.
        inputs: one batch, as the model takes it; None runs random values of the shape of the calibration data, and
            measures no time for a model that holds no report.
        repeats: runs of each model; 0 measures no time.

    Raises:
        ConfigError: if `hardened` has fewer parameters than `model`.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.ReLU(), torch.nn.Linear(10, 5))
        >>> data = [(torch.randn(8, 4), torch.randint(5, (8,)))]
        >>> safe = fp.harden(net, fp.Ranger(), data=data)
        >>> fp.overhead(net, safe, repeats=0)
        Overhead(parameters=105, thresholds=1, memory_percent=0.9523809523809523, bytes=4, time_ratio=None)
    """
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, hardened)]
    sizes = [sum(parameter.nbytes for parameter in each.parameters()) for each in (model, hardened)]
    if counts[0] == 0 or counts[1] < counts[0]:
        raise ConfigError(
            f"overhead takes the original model first and the hardened one second; these have {counts[0]:,} and "
            f"{counts[1]:,} parameters"
        )
    added = counts[1] - counts[0]
    if inputs is None:
        report = vars(hardened).get(REPORT)
        if isinstance(report, HardeningReport):
            inputs = inputs_like(report.example, next(model.parameters()).device)
    ratio = time_ratio(model, hardened, inputs, repeats) if inputs is not None and repeats > 0 else None
    return Overhead(counts[0], added, 100.0 * added / counts[0], sizes[1] - sizes[0], ratio)


def time_ratio(model: nn.Module, other: nn.Module, inputs: Any, repeats: int) -> float:
    """A forward of the other model ÷ one of the first: medians of so many, in turn, accelerators waited for."""
    seconds: tuple[list[float], list[float]] = ([], [])
    devices = devices_of(model, other, inputs)
    with given_back(model), given_back(other), eval_mode(model), eval_mode(other):
        for run in range(repeats + 1):
            for each, taken in zip((model, other), seconds, strict=True):
                wait_for(devices)
                began = time.perf_counter()
                call(each, inputs)
                wait_for(devices)
                if run:  # the first pass fills caches and allocators
                    taken.append(time.perf_counter() - began)
    return median(seconds[1]) / median(seconds[0])


def devices_of(*things: Any) -> set[torch.device]:
    """Where the tensors of models and inputs lie.

    Example:
        >>> devices_of(nn.Linear(1, 1), [torch.ones(1)])
        {device(type='cpu')}
    """
    found = set()
    for thing in things:
        tensors = (*thing.parameters(), *thing.buffers()) if isinstance(thing, nn.Module) else pytree.tree_leaves(thing)
        found |= {tensor.device for tensor in tensors if isinstance(tensor, Tensor)}
    return found


def wait_for(devices: set[torch.device]) -> None:
    """Wait until accelerators have done all that was asked of them: their calls return before the work is done."""
    for device in devices:
        if device.type in ("cuda", "xpu"):
            getattr(torch, device.type).synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
