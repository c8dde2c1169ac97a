"""Timing and memory that survive a noisy machine: interleaved, median, and only ever as ratios."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import median

import torch


class Size(Enum):
    """How long to measure: the published results, a first look, or one pass over tiny networks to see that it runs."""

    FULL = "full"
    QUICK = "quick"
    SMOKE = "smoke"

    def choose(self, full: int, quick: int, smoke: int) -> int:
        return {Size.FULL: full, Size.QUICK: quick, Size.SMOKE: smoke}[self]


@dataclass(frozen=True)
class Row:
    """One measured ratio.

    Attributes:
        what: numerator ÷ denominator, in words.
        ratio: the number; None if it could not be measured, which `note` explains.
        at_most, at_least: the goal, if there is one.
        percent: print it as a share rather than as a multiple.
    """

    what: str
    ratio: float | None
    at_most: float | None = None
    at_least: float | None = None
    percent: bool = False
    note: str = ""

    @property
    def goal(self) -> str:
        if self.at_most is not None:
            return f"≤ {self._show(self.at_most)}"
        return f"≥ {self._show(self.at_least)}" if self.at_least is not None else ""

    @property
    def measured(self) -> str:
        return "skipped" if self.ratio is None else self._show(self.ratio)

    @property
    def verdict(self) -> str:
        if self.ratio is None or not self.goal:
            return ""
        met = self.ratio <= self.at_most if self.at_most is not None else self.ratio >= (self.at_least or 0.0)
        return "yes" if met else "**no**"

    def _show(self, value: float) -> str:
        return f"{100 * value:.2g} %" if self.percent else f"{value:.3g} ×"


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread and no gradients, as inside a campaign."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def interleaved(actions: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """The median of what each action reports, over rounds that run every action once, in alternating order.

    Whatever disturbs the machine for a while then disturbs numerators and denominators alike. One more round comes
    first and does not count: caches fill, kernels compile.

    Args:
        actions: name → function of the round's number that returns seconds (or anything else to take medians of).
        rounds: how many count.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        names = list(actions) if turn % 2 else list(reversed(actions))
        for name in names:
            value = actions[name](turn)
            if turn:
                found[name].append(value)
    return {name: median(values) for name, values in found.items()}


def keep_freed_memory() -> bool:
    """Tell glibc, for the rest of the process, never to give memory back; False where there is no glibc.

    Big copies then find their pages where the last one left them. Otherwise it is chance whether they do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3
    return mallopt is not None and mallopt(mmap_threshold, 2**30) == 1 and mallopt(trim_threshold, 2**31 - 1) == 1


def memory_can_be_measured() -> bool:
    """Linux keeps a high-water mark of resident memory that can be reset."""
    return Path("/proc/self/clear_refs").exists()


def peak_bytes(action: Callable[[], object]) -> int:
    """The highest resident memory of this process while `action` runs."""
    Path("/proc/self/clear_refs").write_text("5")
    action()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def machine() -> str:
    """The machine in general words, and whether it had something else to do."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    others = f"other processes used {load:.1f} cores" if load >= 0.25 else "otherwise idle"
    name = names[0] if names else platform.machine()
    return (
        f"{name}, {cores} cores, {others} at the start; torch {torch.__version__}, Python {platform.python_version()}"
    )
