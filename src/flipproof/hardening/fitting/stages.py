"""Stages of a search or training that survive an interruption: one line of a journal each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof._fields import Fields
from flipproof.engine.arrays import array_from_json, array_to_json
from flipproof.engine.journal import Journal
from flipproof.errors import JournalMismatch

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Fitted:
    """What is hardened how: the first line. Stages of anything else are not taken."""

    method: str
    weights: str
    data: str
    decision: str
    plan: None = None

    @property
    def identity(self) -> tuple[Mapping[str, str]]:
        """All of it."""
        return ({"method": self.method, "weights": self.weights, "data": self.data, "decision": self.decision},)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**self.identity[0], "plan": None}

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> Fitted:
        """The inverse."""
        about = Fields(header, "the header")
        return cls(about.text("method"), about.text("weights"), about.text("data"), about.text("decision"))


@dataclass(frozen=True, eq=False)
class FinishedStage:
    """A stage's thresholds, its history, its cost, and the state of the generator after it."""

    number: int
    name: str
    thresholds: tuple[NDArray[Any], ...]
    history: Rows
    forwards: float
    generator: NDArray[Any] | None

    @property
    def key(self) -> tuple[int]:
        """Its place in the order of stages."""
        return (self.number,)

    def to_json(self) -> dict[str, Any]:
        """As a line of the journal."""
        return {
            "stage": self.number,
            "name": self.name,
            "thresholds": [array_to_json(values) for values in self.thresholds],
            "history": self.history,
            "forwards": self.forwards,
            "generator": None if self.generator is None else array_to_json(self.generator),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> FinishedStage:
        """The inverse."""
        about = Fields(record, "a stage")
        generator = about.take("generator")
        return cls(
            about.whole("stage", 1),
            about.text("name"),
            tuple(array_from_json(values) for values in about.take("thresholds")),
            [dict(row) for row in about.take("history")],
            about.number("forwards"),
            None if generator is None else array_from_json(generator),
        )


class Stages(ExitStack):
    """Finished stages of a hardening, in a journal while this is active; without one, every stage is run.

    Args:
        path: the journal's file; None keeps nothing.
        about: what must be the same for a stage to be taken.

    Raises:
        JournalError: one of its kinds, on entering: before any work is done.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Fitted) -> None:
        super().__init__()
        self._about = about
        self._journal = None if path is None else Journal(path, Fitted, FinishedStage, kind="hardening")
        self._done: dict[int, FinishedStage] = {}
        self._number = 0

    def __enter__(self) -> Stages:
        if self._journal is not None:
            self._done = {stage.number: stage for stage in self.enter_context(self._journal.writing(self._about))}
        return self

    def run(
        self,
        name: str,
        thresholds: Sequence[Tensor],
        work: Callable[[], tuple[Rows, float]],
        generator: torch.Generator | None = None,
    ) -> tuple[Rows, float, bool]:
        """Take a stage from the journal, or run it and write it there.

        Args:
            name: of the stage; stages come in the same order every time.
            thresholds: what the stage changes, in place.
            work: runs it and gives its history and what it cost in forward-equivalents.
            generator: whose state belongs to the result.

        Returns:
            History and cost, as they were when the stage ran, and whether it was taken from the journal.

        Raises:
            JournalMismatch: if the journal has another stage in its place.
        """
        self._number += 1
        found = self._done.get(self._number)
        if found is not None:
            shapes = [tuple(tensor.shape) for tensor in thresholds]
            if found.name != name or [values.shape for values in found.thresholds] != shapes:
                raise JournalMismatch(
                    f"stage {self._number} of the journal is {found.name!r}, expected {name!r} with thresholds of the "
                    f"shapes {shapes}; choose another journal="
                )
            with torch.no_grad():
                for tensor, values in zip(thresholds, found.thresholds, strict=True):
                    tensor.copy_(torch.from_numpy(values))
            if generator is not None and found.generator is not None:
                generator.set_state(torch.from_numpy(found.generator))
            return found.history, found.forwards, True
        history, forwards = work()
        if self._journal is not None:
            state = None if generator is None else generator.get_state().numpy()
            kept = tuple(tensor.detach().cpu().numpy() for tensor in thresholds)
            self._journal.append(FinishedStage(self._number, name, kept, history, forwards, state))
        return history, forwards, False
