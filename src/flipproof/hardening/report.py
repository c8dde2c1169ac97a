"""What `harden` did to a model: the report that travels with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn

from flipproof.errors import ModelError
from flipproof.hardening.bounds.activations import FUNCTIONS
from flipproof.hardening.fitting.acceptance import Acceptance
from flipproof.hardening.rewriting.sites import ActivationSite, Unreachable
from flipproof.running.deployment import Deployment

REPORT = "_flipproof_hardening"
"""Attribute of a hardened model that holds its report."""


@dataclass(frozen=True)
class HardeningReport:
    """What `harden` did to a model.

    Attributes:
        method: `repr` of the method, which rebuilds it.
        sites: the bounded activations and outputs of layers, in order of execution.
        unreachable: activations that are as they were, with the reason.
        notes: what else the user should know.
        parameters: of the original model; `thresholds`: values added to it.
        history: the method's own record of its search or training, a row a step; empty for closed forms.
        clean_drop: accuracy lost on the held-out samples, which nothing was fitted to, a fraction; negative for a
            gain. `judged` has its interval.
        seconds: what it took.
        forwards: passes over the whole calibration data that it took, in forward-equivalents: multiplications of what
            was run, backward passes included, ÷ those of a forward pass.
        judged: the held-out samples before and after, pair by pair; None for files of older versions.
        slack: bounds lie (or the search for them began) at so many times the largest values seen; None for methods
            that do not say.
        deployment: whether it answers alike one sample at a time and exported (`check_deployment`); None if that was
            not asked for (``gate=False``).
        example: (shape, dtype) of the inputs of one batch, to time the model with; None if they are not all tensors.
    """

    method: str
    sites: tuple[ActivationSite, ...]
    unreachable: tuple[Unreachable, ...]
    notes: tuple[str, ...]
    parameters: int
    thresholds: int
    history: pd.DataFrame = field(repr=False, compare=False)
    clean_drop: float
    seconds: float
    forwards: float
    example: Any = field(repr=False, compare=False, default=None)
    judged: Acceptance | None = None
    slack: float | None = None
    deployment: Deployment | None = None

    def table(self) -> pd.DataFrame:
        """One row an activation: `name`, `module`, `function`, `calls`, `bounded`, `reason`."""
        rows: list[dict[str, Any]] = [
            {
                "name": s.name,
                "module": s.module,
                "function": s.function,
                "calls": s.calls,
                "bounded": True,
                "reason": "",
            }
            for s in self.sites
        ]
        rows += [
            {"name": u.name, "module": "", "function": "", "calls": 0, "bounded": False, "reason": u.reason}
            for u in self.unreachable
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        layers = sum(site.function not in ("identity", *FUNCTIONS) for site in self.sites)
        bounded = f"{len(self.sites) - layers} activations" + (f" and {layers} outputs of layers" if layers else "")
        lines = [f"{self.method}: {bounded} bounded by {self.thresholds:,} stored thresholds"]
        lines += [f"  not bounded: {entry.name}: {entry.reason}" for entry in self.unreachable]
        if self.judged is not None:
            lines.append(f"  {self.judged}")
        if self.deployment is not None:
            lines += [f"  {line}" for line in str(self.deployment).splitlines()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def hardening_report(model: nn.Module) -> HardeningReport:
    """What `harden` did to this model.

    Raises:
        ModelError: if the model was not made by `harden`.
    """
    report = vars(model).get(REPORT)
    if not isinstance(report, HardeningReport):
        raise ModelError(f"{type(model).__name__} was not hardened by flipproof, so there is no report about it")
    return report
