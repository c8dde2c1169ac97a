"""A progress bar with an ETA on a terminal, and silence elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Step(Protocol):
    """Called after each trial with the label of its point and how many steps it was worth."""

    def __call__(self, label: str, steps: int = 1) -> None:
        """Advance."""


@contextmanager
def progress_bar(total: int, done: int, *, show: bool | None) -> Iterator[Step]:
    """A bar over `total` trials of which `done` are already in the journal.

    Args:
        total: trials in all.
        done: trials that need not be run.
        show: None shows it if standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda label, steps=1: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # no refresh thread: workers may be forked at any time, and a thread could hold a lock then
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    drawn = 0.0
    with bar:
        task = bar.add_task("trials", total=total, completed=done)

        def step(label: str, steps: int = 1) -> None:
            nonlocal drawn
            bar.update(task, advance=steps, description=label)
            now = time.monotonic()
            if now - drawn > 0.1:
                bar.refresh()
                drawn = now

        bar.refresh()
        yield step
        bar.refresh()
