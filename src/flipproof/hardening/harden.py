"""`harden`: a copy of a model whose activations are bounded, and the report of what was and what was not."""

from __future__ import annotations

import os
import time
import warnings
from hashlib import blake2b

import torch
from torch import nn

from flipproof._interrupts import gives_back
from flipproof.campaigns.fingerprint import rule_of
from flipproof.errors import ConfigError, FlipproofWarning, ModelError
from flipproof.hardening import methods
from flipproof.hardening._example_inputs import shapes_of
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting.acceptance import ROUNDING_SAMPLES, Acceptance, unsteady_layers
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.profile import profile, ranges_of
from flipproof.hardening.fitting.stages import Fitted, Stages
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.report import REPORT, HardeningReport
from flipproof.hardening.rewriting.sites import Rewritten, refuse_what_hides_its_values, rewrite
from flipproof.running.data import Data, Output, tensor_bytes
from flipproof.running.decision import DecisionChoice
from flipproof.running.deployment import Deployment
from flipproof.running.device import device_of
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.running.ways import DEPLOYMENT, OPERATIONS, SAMPLES, Few

MEMORISED, MANY = 0.99, 50
"""From this accuracy on so many samples, the report reminds that the model may have been trained on them."""

STEPS_FOR_ROUNDING = 5
"""So often bounds are widened by a hundredth where rounding alone crosses them."""


@gives_back
def harden(
    model: nn.Module,
    *given: Data | Hardening,
    data: Data | None = None,
    method: Hardening | None = None,
    strict: bool = False,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: bool | None = None,
    gate: bool = True,
) -> nn.Module:
    """A copy of a model whose activations are bounded, so that faulty values are cut off where they arise.

    The model itself stays untouched. The copy is on the same device, in the same training state, with the same hooks;
    its `state_dict` holds the same names as before, plus the thresholds. Thresholds are parameters, so they are in the
    fault space, and no gradient is asked of them. What was done is in `hardening_report(copy)`.

    Args:
        model: any module that gives one class score vector, or one score, a sample.
        given: data and method, as in ``harden(model, data, fp.Guard())``; either may be given by keyword instead.
        data: calibration batches `(inputs, targets)`; use training or validation data, never the data that the
            hardened model will be judged on, and best data that the model was not trained on. A random quarter of it
            (`held_out` of the method) is kept aside; no bound is fitted to it, and `clean_drop` is judged on it. A
            warning says so if the hardened copy loses more than a point of accuracy there, or any significant share.
        method: e.g. ``fp.Ranger()`` or ``fp.ProAct()``; there is no default.
        strict: raise instead of warning where an activation cannot be bounded.
        output: picks the tensor to judge out of what the model returns: function, dict key or tuple index.
        task: what the model is for, as for `assess`; "accuracy" is its main metric.
        decision: how outputs become classes, as for `assess`.
        journal: file for the finished stages (layers) of a method that searches or trains: run again after an
            interruption and it resumes there, to the same thresholds. None keeps nothing.
        workers: processes for the campaigns that a method runs (`FTClipAct`); thresholds do not depend on it.
        progress: show a bar; None shows it on a terminal.
        gate: end with `check_deployment` on a few held-out samples: one at a time against all together, `torch.export`,
            and onnxruntime where it is installed, each beside what the model itself differs by. What came of it is in
            the report, and a warning if answers differ by more than rounding. False leaves it out.

    Raises:
        ConfigError: if the method or the data is missing or given twice.
        ModelError: if no activation can be bounded (or, with `strict`, not all), if the model computes NaN without
            faults, or if bounds collapse to 0.
        DataError: if the calibration data is empty, holds NaN or does not fit the model.
        JournalMismatch: if `journal` holds the stages of another model, method or data.

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
    data, method = _data_and_method(given, data, method)
    began = time.perf_counter()
    refuse_what_hides_its_values(model)
    whole = Calibration.read(model, data, device_of(model), output, task_of(task, decision))
    calibration, held = whole.split(method.held_out, method.seed)
    about = Fitted(repr(method), _weights(model), whole.batches.digest(), rule_of(whole.judge))
    rewritten = rewrite(model, whole.batches.inputs[0], open_recurrent=method.open_recurrent)
    ranges = profile(rewritten, calibration)
    if whole.cut is None:  # inputs may have sizes that the data to fit on does not show
        elsewhere = ranges_of(rewritten, held)
        for site, seen in ranges.items():
            if site.module in elsewhere:
                seen.admit(elsewhere[site.module].shapes)
    with Stages(journal, about) as stages:
        work = Work(rewritten, ranges, calibration, progress, stages=stages, samples=whole.samples, seed=method.seed)
        work.workers = workers
        work.spend(whole, 1.0)  # the unbounded model's answers
        work.spend(calibration, 1.0)  # ranges
        if whole.cut is None:
            work.spend(held, 1.0)
        history = method.fit(work)
    _check(rewritten)
    unsteady = _steady(model, method, work, held)
    judged = Acceptance.of(held, rewritten.model)
    work.spend(held, 1.0)
    if whole.accuracy >= MEMORISED and whole.samples >= MANY:
        work.notes.append(
            f"the model is right on {whole.accuracy:.1%} of the calibration data: if it was trained on them, a drop of "
            f"accuracy shows late there; the number of disturbed samples says more"
        )
    vars(rewritten.model).pop(DEPLOYMENT, None)  # of the model that this was made of
    deployment = deployed(rewritten.model, model, held) if gate else None
    parameters, with_thresholds = (sum(p.numel() for p in each.parameters()) for each in (model, rewritten.model))
    report = HardeningReport(
        method=repr(method),
        sites=tuple(rewritten.sites),
        unreachable=tuple(rewritten.unreachable),
        notes=(*work.notes, *_shared(rewritten)),
        parameters=parameters,
        thresholds=with_thresholds - parameters,
        history=history,
        clean_drop=judged.drop,
        seconds=time.perf_counter() - began,
        forwards=work.forwards,
        example=shapes_of(whole.batches.inputs[0]),
        judged=judged,
        slack=work.slack,
        deployment=deployment,
    )
    vars(rewritten.model)[REPORT] = report
    if report.unreachable:
        listed = "".join(f"\n  {entry.name}: {entry.reason}" for entry in report.unreachable)
        message = f"{len(report.unreachable)} activations are not bounded and let faulty values through:{listed}"
        if strict:
            raise ModelError(message)
        warnings.warn(message, FlipproofWarning, stacklevel=3)
    if unsteady:
        warnings.warn(
            f"a sample alone and the same sample in its batch get different answers from the hardened copy, because "
            f"right values lie at the bounds of {', '.join(unsteady[:5])} and rounding carries them across; leave more "
            f"room: slack=1.25, or None to have it found",
            FlipproofWarning,
            stacklevel=3,
        )
    if deployment is not None and not deployment.agrees and not unsteady:  # once is enough
        warnings.warn(
            f"the hardened copy answers otherwise where it is deployed. {deployment}", FlipproofWarning, stacklevel=3
        )
    if judged.costs:
        warnings.warn(
            f"{type(method).__name__} costs accuracy: {judged}. Pass more calibration data, data that the model has "
            f"not been trained on, or wider bounds",
            FlipproofWarning,
            stacklevel=3,
        )
    return rewritten.model


def _data_and_method(
    given: tuple[Data | Hardening, ...], data: Data | None, method: Hardening | None
) -> tuple[Data, Hardening]:
    """What was given by position and by keyword; a hardening is known by its type."""
    chosen = [each for each in (*given, method) if isinstance(each, Hardening)]
    others = [each for each in (*given, data) if each is not None and not isinstance(each, Hardening)]
    everything: tuple[object, ...] = (*given, method)
    for each in everything:
        if isinstance(each, type) and issubclass(each, Hardening):
            raise ConfigError(f"harden takes an instance: {each.__name__}(), not the class {each.__name__}")
    if method is not None and not isinstance(method, Hardening):
        raise ConfigError(f"harden takes a hardening such as fp.Ranger() for method=, got {method!r}")
    if len(chosen) != 1:
        known = ", ".join(
            sorted(k.__name__ for k in vars(methods).values() if isinstance(k, type) and k is not Hardening)
        )
        came = ", ".join(map(repr, chosen)) or ", ".join(type(each).__name__ for each in given) or "none"
        raise ConfigError(f"harden takes a hardening as its method, one and not more, of {known}; got {came}")
    if len(others) != 1:
        raise ConfigError(f"harden takes one set of calibration data, harden(model, data, method), got {len(others)}")
    return others[0], chosen[0]


def _steady(model: nn.Module, method: Hardening, work: Work, held: Calibration) -> list[str]:
    """Layers at which batch 1 and batch N part, after their bounds were widened where that was not forbidden."""
    if held.cut is None:
        work.notes.append("batch 1 was not held against batch N: the samples of a batch cannot be taken apart")
        return []
    may_widen = getattr(method, "slack", None) is None
    for _ in range(STEPS_FOR_ROUNDING):
        unsteady = unsteady_layers(model, work.rewritten, held)
        work.spend(held, 2.0 * min(1.0, ROUNDING_SAMPLES / held.samples))
        if not unsteady or not may_widen:
            return unsteady
        with torch.no_grad():
            for site in work.rewritten.sites:
                if site.name in unsteady:
                    bound = work.rewritten.model.get_submodule(site.module)
                    assert isinstance(bound, Bounded)
                    for end, sign in ((bound.threshold, 1), (bound.low, -1)):
                        if end is not None:
                            end.add_(sign * 0.01 * end.abs().clamp_min(float(end.abs().mean())))
        work.notes.append(f"bounds of {', '.join(unsteady)} were widened by 1 %: rounding alone carried values across")
    return unsteady_layers(model, work.rewritten, held)


def deployed(model: nn.Module, plain: nn.Module, held: Calibration, decoded: nn.Module | None = None) -> Deployment:
    """Whether a model answers a few samples alike one by one and exported, as far as the plain one; kept with it."""
    count = min(SAMPLES, held.samples)
    some = held.some(torch.arange(count), count).batches
    few = Few(some.inputs[0], held.cut, count, held.output, some.targets, held.judge)
    found = vars(model)[DEPLOYMENT] = few.compared(model, plain, operations=OPERATIONS, decoded=decoded)
    return found


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
