"""What a hardening method works on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flipproof.engine.progress import Step
from flipproof.hardening.bounds.activations import Activation, take_place
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting._slack import FOLDS, search_slack, set_bounds, union, widened
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.profile import Per, Range, profile, ranges_of
from flipproof.hardening.fitting.stages import Fitted, Rows, Stages
from flipproof.hardening.rewriting.sites import ActivationSite, Rewritten


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
        workers: processes for the campaigns that a method runs.
    """

    rewritten: Rewritten
    ranges: Mapping[ActivationSite, Range]
    calibration: Calibration
    progress: bool | None
    forwards: float = 0.0
    notes: list[str] = field(default_factory=list)
    stages: Stages = field(default_factory=lambda: Stages(None, Fitted("", "", "", "")))
    samples: int | None = None
    seed: int = 0
    slack: float | None = None
    workers: int = 1

    @property
    def model(self) -> nn.Module:
        """The copy being hardened."""
        return self.rewritten.model

    def bound(
        self, site: ActivationSite, kind: type[Bounded], threshold: Tensor, low: Tensor | None = None, **more: Any
    ) -> Bounded:
        """Put a bound in a site's place and give it back."""
        return put_bound(self.rewritten, site, kind, threshold, low, **more)

    def open_layers(self, leave: Collection[str] = ()) -> None:
        """Make outputs of convolutions, linear and normalisation layers sites too, and see what they span.

        Args:
            leave: names of layers that are to stay as they are.
        """
        self.rewritten.open_layers(self.calibration.batches.inputs[0], leave)
        found = profile(self.rewritten, self.calibration)
        self.spend(self.calibration, 1.0)
        self.ranges = {site: self.ranges.get(site, seen) for site, seen in found.items()}

    def place(
        self,
        kind: type[Bounded] | Callable[[ActivationSite], type[Bounded]],
        per: Per | Callable[[ActivationSite], Per],
        slack: float | None,
        *,
        of: Literal["input", "output"] = "output",
        **more: Any,
    ) -> dict[ActivationSite, Bounded]:
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
        bounds: dict[ActivationSite, Bounded] = {}
        grain: dict[ActivationSite, Per] = {}
        for site in self.ranges:
            wanted = per(site) if callable(per) else per
            grain[site] = whole[site.module].finest(wanted)
            if wanted == "neuron" != grain[site]:
                self.notes.append(
                    f"{site.name} is computed for maps of different sizes, {sorted(whole[site.module].shapes)[:3]}: "
                    f"its bounds are one a {grain[site]}, not a neuron"
                )
            low, threshold = widened(whole[site.module], grain[site], 1.0, rounding=False)
            bounds[site] = self.bound(site, kind if isinstance(kind, type) else kind(site), threshold, low, **more)
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
    rewritten: Rewritten,
    site: ActivationSite,
    kind: type[Bounded],
    threshold: Tensor,
    low: Tensor | None = None,
    **more: Any,
) -> Bounded:
    """Put a bound in the place of the plain activation at a site, with its hooks and arguments."""
    current = rewritten.model.get_submodule(site.module)
    assert isinstance(current, Activation)
    new = kind(
        threshold,
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
