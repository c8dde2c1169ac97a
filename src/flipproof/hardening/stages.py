"""Stages of a search or training that survive an interruption: one file a finished stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flipproof._files import replacing
from flipproof.errors import JournalError, JournalMismatch

Rows = list[dict[str, Any]]


class Stages:
    """Finished stages of a hardening, in a folder; without one, every stage is run.

    A file holds a stage's thresholds, the state of the generator after it, its history and what identifies the
    hardening. It is written whole or not at all, so that an interruption loses the stage under way and nothing else.

    Args:
        folder: where; None keeps nothing.
        identity: what must be the same for a stage to be taken: method, weights, data.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: dict[str, str]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity = identity
        self._number = 0
        if self.folder is not None:
            for path in sorted(self.folder.glob("*.safetensors")):
                self._read(path)  # refuse a folder of another hardening before any work is done

    def run(
        self,
        name: str,
        thresholds: Sequence[Tensor],
        work: Callable[[], tuple[Rows, float]],
        generator: torch.Generator | None = None,
    ) -> tuple[Rows, float, bool]:
        """Take a stage from its file, or run it and write the file.

        Args:
            name: of the stage; stages come in the same order every time.
            thresholds: what the stage changes, in place.
            work: runs it and gives its history and what it cost in forward-equivalents.
            generator: whose state belongs to the result.

        Returns:
            History and cost, as they were when the stage ran, and whether it was taken from a file.
        """
        self._number += 1
        if self.folder is None:
            return *work(), False
        path = self.folder / f"{self._number:03d}.safetensors"
        if path.exists():
            tensors, about = self._read(path)
            if about["stage"] == name and len(tensors) == len(thresholds) + (generator is not None):
                with torch.no_grad():
                    for i, threshold in enumerate(thresholds):
                        threshold.copy_(tensors[f"threshold.{i}"])
                if generator is not None:
                    generator.set_state(tensors["generator"])
                return about["history"], float(about["forwards"]), True
            raise JournalMismatch(f"{path} holds stage {about['stage']!r}, expected {name!r}; choose another journal=")
        history, forwards = work()
        tensors = {f"threshold.{i}": t.detach().cpu().contiguous() for i, t in enumerate(thresholds)}
        if generator is not None:
            tensors["generator"] = generator.get_state()
        about = {"stage": name, "history": history, "forwards": forwards, "identity": self.identity}
        _write(path, tensors, {"flipproof_stage": json.dumps(about)})
        return history, forwards, False

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["flipproof_stage"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise JournalError(
                f"{path} is not a finished stage of a hardening ({error}); nothing was changed. Choose another journal="
            ) from error
        different = {k: (v, self.identity.get(k)) for k, v in about["identity"].items() if v != self.identity.get(k)}
        if different:
            lines = "".join(f"\n  {name}: {was} → {now}" for name, (was, now) in different.items())
            raise JournalMismatch(
                f"{path.parent} holds the stages of another hardening; nothing was changed. What differs (stored → "
                f"now):{lines}\nResume with the same model, data and method, or choose another journal="
            )
        return tensors, about


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error.strerror or error}") from error
