"""What a hardening method is, and what it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.engine.progress import Step
from flipproof.errors import ConfigError
from flipproof.hardening.bounds.activations import Activation, take_place
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.profile import Per, Range, ranges_of
from flipproof.hardening.fitting.slack import FOLDS, search_slack, set_bounds, union, widened
from flipproof.hardening.rewriting.sites import Rewritten, Site
from flipproof.hardening.stages import Rows, Stages

HELD_OUT = 0.25
"""Share of the calibration samples that nothing is fitted to: acceptance is judged on them."""


@dataclass
class Work:
    """What a method works on.

    Attributes:
        rewritten: the copy with its sites; a method puts a `Bounded` in the place of each.
        ranges: what each site's output spans on the data to fit on, in order of execution.
        calibration: the data to fit on, with the unbounded model's answers. `harden` keeps the held-out part to itself.
        progress: whether to show a bar; None on a terminal.
        forwards: forward-equivalents of all calibration data spent so far; methods add to it by `spend`.
        notes: for the report.
        stages: finished stages of an interrupted run.
        samples: of all calibration data, the held-out part included; None for those of `calibration`.
        seed: of random parts.
        slack: what `place` came to, for the report; None if no search was made.
    """

    rewritten: Rewritten
    ranges: Mapping[Site, Range]
    calibration: Calibration
    progress: bool | None
    forwards: float = 0.0
    notes: list[str] = field(default_factory=list)
    stages: Stages = field(default_factory=lambda: Stages(None, {}))
    samples: int | None = None
    seed: int = 0
    slack: float | None = None

    @property
    def model(self) -> nn.Module:
        """The copy being hardened."""
        return self.rewritten.model

    def bound(self, site: Site, kind: type[Bounded], high: Tensor, low: Tensor | None = None, **more: Any) -> Bounded:
        """Put a bound in a site's place and give it back."""
        return put_bound(self.rewritten, site, kind, high, low, **more)

    def place(
        self,
        kind: type[Bounded] | Callable[[Site], type[Bounded]],
        per: Per | Callable[[Site], Per],
        slack: float | None,
        *,
        of: Literal["input", "output"] = "output",
        **more: Any,
    ) -> dict[Site, Bounded]:
        """Put a bound at every site: at `slack` times what was seen there, or as far beyond it as unseen inputs need.

        Args:
            kind: of the bounds, or which one at a site.
            per: a bound a layer, channel or neuron, or which of them at a site.
            slack: 1 is the largest value seen itself, without room for rounding. None finds the smallest that hardly
                disturbs samples which the bounds have not seen (`search_slack`), and leaves room for rounding.
            of: whether the bounds are of the activation's output or input.
            more: for `kind`.
        """
        parts = self.calibration.folds(FOLDS, self.seed) if slack is None else [self.calibration]
        seen = [ranges_of(self.rewritten, part, of=of) for part in parts]
        self.spend(self.calibration, 1.0)
        for site, known in self.ranges.items():
            for ranges in seen:
                if site.module in ranges:
                    ranges[site.module].admit(known.shapes)
        if per in ("layer", "channel"):  # extremes of every neuron, for every part, are more than is needed
            for each in (each for ranges in seen for each in ranges.values()):
                each.neuron_low = each.neuron_high = None
        whole = union(seen)
        bounds: dict[Site, Bounded] = {}
        grain: dict[Site, Per] = {}
        for site in self.ranges:
            wanted = per(site) if callable(per) else per
            grain[site] = whole[site.module].finest(wanted)
            if wanted == "neuron" != grain[site]:
                self.notes.append(
                    f"{site.name} is computed for maps of different sizes, {sorted(whole[site.module].shapes)[:3]}: "
                    f"its bounds are one a {grain[site]}, not a neuron"
                )
            low, high = widened(whole[site.module], grain[site], 1.0, rounding=False)
            bounds[site] = self.bound(site, kind if isinstance(kind, type) else kind(site), high, low, **more)
        if slack is None:
            found = search_slack(self.rewritten, parts, seen, bounds, grain, spend=self.spend)
            self.notes.append(str(found))
            set_bounds(bounds, whole, grain, found.value)
            self.slack = found.value
        else:
            set_bounds(bounds, whole, grain, slack, rounding=False)
            self.slack = slack
        return bounds

    def stage(
        self,
        name: str,
        bounds: Sequence[Bounded],
        run: Callable[[], Rows],
        *,
        step: Step,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> Rows:
        """Run one stage of a method, or take it from an interrupted run; either leaves the same thresholds.

        Args:
            name: of the stage.
            bounds: whose thresholds it changes.
            run: does it and returns its history.
            step: the progress bar, for a stage that is not run; `steps` is what it counts for.
            steps: see `step`.
            generator: whose state the stage changes.
        """
        stored = [tensor for bound in bounds for tensor in (bound.threshold, bound.low) if tensor is not None]
        before = self.forwards

        def counted() -> tuple[Rows, float]:
            rows = run()
            return rows, self.forwards - before

        rows, spent, taken = self.stages.run(name, stored, counted, generator)
        if taken:
            self.forwards = before + spent
            step(f"{name} was done", steps)
        return rows

    def spend(self, calibration: Calibration, forwards: float) -> None:
        """Count passes over some data, in units of all calibration data."""
        self.forwards += forwards * calibration.samples / (self.samples or self.calibration.samples)


def put_bound(
    rewritten: Rewritten, site: Site, kind: type[Bounded], high: Tensor, low: Tensor | None = None, **more: Any
) -> Bounded:
    """Put a bound in the place of the plain activation at a site, with its hooks and arguments."""
    current = rewritten.model.get_submodule(site.module)
    assert isinstance(current, Activation)
    new = kind(
        high,
        current.function,
        low=None if current.rectifies else low,
        arguments=current.arguments,
        inplace=current.inplace,
        weight=current.weight,
        **more,
    )
    take_place(new, current)
    rewritten.swap(site, new)
    return new


@dataclass(frozen=True)
class Hardening(ABC):
    """A way to choose bounds. Frozen; its `repr` rebuilds it and is kept in records.

    A new one is a frozen dataclass with `fit`; `harden` finds the activations, profiles them, checks what came out
    and writes the report. Fields of the name `held_out` (the share of the samples that `harden` keeps to judge on) and
    `seed` (of the draw of that part) take the place of the defaults.
    """

    held_out = HELD_OUT
    seed = 0

    open_recurrent: ClassVar[bool] = False
    """True if LSTM, GRU and RNN layers are to be opened, so that each of their gates is a site."""

    @abstractmethod
    def fit(self, work: Work) -> pd.DataFrame:
        """Put a bound at every site of `work`; returns the history of the search, a row a step."""


def check_fields(method: Hardening) -> None:
    """Check the fields that most methods share.

    Raises:
        ConfigError: if `slack` is below 1, `held_out` not in (0, 1) or `seed` negative.
    """
    slack = getattr(method, "slack", None)
    if slack is not None and not 1 <= slack < float("inf"):
        raise ConfigError(f"{type(method).__name__}: slack is None or at least 1, got {method!r}")
    if not 0 < method.held_out < 1 or method.seed < 0:
        raise ConfigError(f"{type(method).__name__}: held_out lies in (0, 1) and seed is not negative, got {method!r}")
