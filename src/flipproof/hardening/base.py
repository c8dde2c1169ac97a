"""`harden`: a copy of a model whose activations are bounded, and the report of what was and what was not."""

from __future__ import annotations

import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.campaigns.batches import Data, Output, tensor_bytes
from flipproof.campaigns.progress import Step
from flipproof.errors import ConfigError, FlipproofWarning, ModelError
from flipproof.hardening.activations import Activation, take_place
from flipproof.hardening.bounded import Bounded
from flipproof.hardening.calibration import Calibration
from flipproof.hardening.example import shapes_of
from flipproof.hardening.profile import Range, profile
from flipproof.hardening.report import REPORT, HardeningReport
from flipproof.hardening.rewriting import Rewritten, Site, rewrite
from flipproof.hardening.stages import Rows, Stages
from flipproof.interrupts import gives_back


@dataclass
class Work:
    """What a method works on.

    Attributes:
        rewritten: the copy with its sites; a method puts a `Bounded` in the place of each.
        ranges: what each site's output spans on the calibration data, in order of execution.
        calibration: all calibration data, with the unbounded model's answers.
        progress: whether to show a bar; None on a terminal.
        forwards: forward-equivalents of the whole calibration data spent so far; methods add to it.
        accepted_on: the data on which acceptance was judged, if not all.
        notes: for the report.
        stages: finished stages of an interrupted run.
    """

    rewritten: Rewritten
    ranges: Mapping[Site, Range]
    calibration: Calibration
    progress: bool | None
    forwards: float = 0.0
    accepted_on: Calibration | None = None
    notes: list[str] = field(default_factory=list)
    stages: Stages = field(default_factory=lambda: Stages(None, {}))

    @property
    def model(self) -> nn.Module:
        """The copy being hardened."""
        return self.rewritten.model

    def bound(self, site: Site, kind: type[Bounded], high: Tensor, low: Tensor | None = None, **more: Any) -> Bounded:
        """Put a bound in a site's place and give it back."""
        return put_bound(self.rewritten, site, kind, high, low, **more)

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
        """Count passes over some data, in units of the whole calibration data."""
        self.forwards += forwards * calibration.samples / self.calibration.samples


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
    and writes the report.
    """

    open_recurrent: ClassVar[bool] = False
    """True if LSTM, GRU and RNN layers are to be opened, so that each of their gates is a site."""

    @abstractmethod
    def fit(self, work: Work) -> pd.DataFrame:
        """Put a bound at every site of `work`; returns the history of the search, a row a step."""


@gives_back
def harden(
    model: nn.Module,
    method: Hardening,
    *,
    data: Data,
    strict: bool = False,
    output: Output = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of a model whose activations are bounded, so that faulty values are cut off where they arise.

    The model itself stays untouched. The copy is on the same device, in the same training state, with the same hooks;
    its `state_dict` holds the same names as before, plus the thresholds. Thresholds are parameters, so they are in the
    fault space, and no gradient is asked of them. What was done is in `hardening_report(copy)`.

    Args:
        model: any module that gives one class score vector, or one score, a sample.
        method: e.g. ``fp.Ranger()`` or ``fp.ProAct()``.
        data: calibration batches `(inputs, targets)`; use training or validation data, never the data that the
            hardened model will be judged on. Methods that search keep a held-out part of it to accept on.
        strict: raise instead of warning where an activation cannot be bounded.
        output: picks the tensor to judge out of what the model returns: function, dict key or tuple index.
        store: folder for the finished stages (layers) of a method that searches or trains: run again after an
            interruption and it resumes there, to the same thresholds. None keeps nothing.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ModelError: if no activation can be bounded (or, with `strict`, not all), if the model computes NaN without
            faults, or if bounds collapse to 0.
        DataError: if the calibration data is empty, holds NaN or does not fit the model.
        JournalMismatch: if `store` holds the stages of another model, method or data.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> safe = fp.harden(net, fp.Ranger(), data=[(torch.randn(16, 4), torch.randint(3, (16,)))])
        >>> [site.name for site in fp.hardening_report(safe).sites], safe[1]
        (['1:0'], Saturate(relu, per layer))
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"harden takes a torch.nn.Module first, got {model!r}")
    if not isinstance(method, Hardening):
        raise ConfigError(f"harden takes a hardening such as fp.Ranger(), got {method!r}")
    began = time.perf_counter()
    calibration = Calibration.read(model, data, _device_of(model), output)
    identity = {"method": repr(method), "weights": _weights(model), "data": calibration.batches.digest()}
    stages = Stages(store, identity)
    rewritten = rewrite(model, calibration.batches.inputs[0], open_recurrent=method.open_recurrent)
    work = Work(rewritten, profile(rewritten, calibration), calibration, progress, forwards=2.0, stages=stages)
    history = method.fit(work)
    _check(rewritten)
    parameters, with_thresholds = (sum(p.numel() for p in each.parameters()) for each in (model, rewritten.model))
    judged = work.accepted_on or calibration
    report = HardeningReport(
        method=repr(method),
        sites=tuple(rewritten.sites),
        unreachable=tuple(rewritten.unreachable),
        notes=(*work.notes, *_shared(rewritten)),
        parameters=parameters,
        thresholds=with_thresholds - parameters,
        history=history,
        clean_drop=judged.accuracy - judged.accuracy_of(rewritten.model),
        seconds=time.perf_counter() - began,
        forwards=work.forwards,
        example=shapes_of(calibration.batches.inputs[0]),
    )
    vars(rewritten.model)[REPORT] = report
    if report.unreachable:
        listed = "".join(f"\n  {entry.name}: {entry.reason}" for entry in report.unreachable)
        message = f"{len(report.unreachable)} activations are not bounded and let faulty values through:{listed}"
        if strict:
            raise ModelError(message)
        warnings.warn(message, FlipproofWarning, stacklevel=3)
    return rewritten.model


def _check(rewritten: Rewritten) -> None:
    """Make sure that every site has usable thresholds.

    Raises:
        ModelError: naming every site whose thresholds are NaN, infinite or all 0.
    """
    problems = []
    for site in rewritten.sites:
        module = rewritten.model.get_submodule(site.module)
        if not isinstance(module, Bounded):
            raise ModelError(f"{site.name} was left without a bound; the method must bound every site or dismiss it")
        bounds = [module.threshold, *([module.low] if module.low is not None else [])]
        if not all(bool(torch.isfinite(bound).all()) for bound in bounds):
            problems.append(f"{site.name}: its thresholds are NaN or infinite")
        elif module.rectifies and not bool((module.threshold > 0).any()):
            problems.append(
                f"{site.name}: its thresholds collapsed to {float(module.threshold.max()):g}, so all is cut"
            )
    if problems:
        raise ModelError(
            "these bounds would leave nothing of the model:\n  "
            + "\n  ".join(problems)
            + "\nWas the regularisation too strong, or the learning rate too large?"
        )


def _weights(model: nn.Module) -> str:
    state = blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state.update(name.encode() + tensor_bytes(tensor))
    return state.hexdigest()


def _shared(rewritten: Rewritten) -> list[str]:
    return [
        f"{site.name} runs {site.calls} times in one forward pass under one bound: the module that holds it is called "
        f"that often, or its forward cannot be traced"
        for site in rewritten.sites
        if site.calls > 1
    ]


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
