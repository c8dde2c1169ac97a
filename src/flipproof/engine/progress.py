"""How far long work has come, and when it ends: a bar on a terminal, a line in a notebook, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from flipproof.errors import ConfigError

EVERY = 0.1
"""Seconds between two drawings on a terminal or in a notebook."""

LOG_EVERY = 10.0
"""Seconds between two lines of a log."""


class Step(Protocol):
    """Says that work went on."""

    def __call__(self, label: str, steps: int = 1) -> None:
        """Advance."""


@contextmanager
def progress_bar(total: int, done: int, *, show: bool | None) -> Iterator[Step]:
    """Shows progress and the time that is left, over `total` jobs of which `done` need not be done.

    On a terminal that is a bar, in a notebook one line that changes, and elsewhere (a log, a batch job) a plain line
    every ten seconds: done / total, jobs a second, time left.

    Args:
        total: jobs in all.
        done: jobs that the journal already has.
        show: None shows it on a terminal and in a notebook; True also in a log; False never.

    Raises:
        ConfigError: if `show` is something else.

    Example:
        >>> with progress_bar(2, 0, show=False) as step:
        ...     step("first")
    """
    if show is not None and not isinstance(show, bool):
        raise ConfigError(f"progress= takes True, False or None (on a terminal), got {show!r}")
    terminal, notebook = sys.stderr.isatty(), _notebook()
    if show is False or (show is None and not terminal and notebook is None):
        yield lambda label, steps=1: None
    elif notebook is not None:
        shown = notebook({"text/plain": ""}, raw=True, display_id=True)
        with _lines(total, done, EVERY, lambda line: shown.update({"text/plain": line}, raw=True)) as step:
            yield step
    elif terminal:
        with _bar(total, done) as step:
            yield step
    else:
        with _lines(total, done, LOG_EVERY, lambda line: print(line, file=sys.stderr, flush=True)) as step:
            yield step


@contextmanager
def _bar(total: int, done: int) -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
        task = bar.add_task("", total=total, completed=done)

        def step(label: str, steps: int = 1) -> None:
            nonlocal drawn
            bar.update(task, advance=steps, description=label)
            now = time.monotonic()
            if now - drawn > EVERY:
                bar.refresh()
                drawn = now

        bar.refresh()
        yield step
        bar.refresh()


@contextmanager
def _lines(total: int, done: int, every: float, write: Callable[[str], None]) -> Iterator[Step]:
    """A line now and then, and one at the end."""
    began = drawn = time.monotonic()
    finished, last = done, ""

    def line() -> str:
        seconds = time.monotonic() - began
        rate = (finished - done) / seconds if seconds > 0 else 0.0
        left = f"{clock((total - finished) / rate)} left" if rate > 0 else "time left unknown"
        return f"{last + ': ' if last else ''}{finished:,}/{total:,}, {rate:.3g} a second, {left}"

    def step(label: str, steps: int = 1) -> None:
        nonlocal drawn, finished, last
        finished, last = finished + steps, label
        now = time.monotonic()
        if now - drawn > every:
            write(line())
            drawn = now

    yield step
    if finished > done:
        write(f"{finished:,}/{total:,} in {clock(time.monotonic() - began)}")


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(59), clock(3700)
    ('0:59', '1:01:40')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _notebook() -> Callable[..., Any] | None:
    """How to show something in the notebook that runs this; None where none does."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    return display if type(get_ipython()).__name__ == "ZMQInteractiveShell" else None
