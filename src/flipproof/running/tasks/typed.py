"""Tasks as text: on a command line, in a campaign file, in a saved map."""

from __future__ import annotations

from flipproof import _literals
from flipproof.errors import ConfigError
from flipproof.running import tasks
from flipproof.running.tasks.base import Task


def task_read(text: str | None) -> Task | None:
    """A task from its repr, such as `Regression(tolerance=0.5)`; None for None.

    Raises:
        ConfigError: showing the text, and the names that may be called.

    Example:
        >>> task_read("Tokens(shift=True)")
        Tokens(ignore=-100, agreement=1.0, shift=True, perplexity=True)
    """
    if text is None:
        return None
    found: Task = _literals.read_typed(text, Task, map(tasks.__dict__.get, tasks.__all__), "Regression(tolerance=0.5)")
    return found


def text_of(task: Task | None) -> str | None:
    """The repr of a task that can be read again; None if it names functions.

    Example:
        >>> import flipproof as fp
        >>> text_of(fp.Detection()), text_of(fp.Custom(wrong=max))
        ('Detection(score=0.5, iou=0.5, most=100)', None)
    """
    try:
        return repr(task) if task is not None and task_read(repr(task)) == task else None
    except ConfigError:
        return None
