"""`assess`: the front door. Golden run, then points × trials into a journal, resumable at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from hashlib import blake2b
from math import isfinite
from numbers import Integral
from re import sub
from typing import Any, cast

import torch
from torch import nn

from flipproof.campaigns.assessment import CHECK_EVERY, Assessment, answer, narrow, planned
from flipproof.campaigns.batches import Data, Output, check_labels, read_batches, tensor_bytes
from flipproof.campaigns.evaluation import eval_mode, golden_run, one_thread
from flipproof.campaigns.executors import Executor, Job, executor
from flipproof.campaigns.journal import Journal
from flipproof.campaigns.neuron_trial import NeuronTrialRunner, neuron_space
from flipproof.campaigns.progress import Step, progress_bar
from flipproof.campaigns.suffix import Suffixes
from flipproof.campaigns.trial import Trial, TrialRunner, versions
from flipproof.errors import ConfigError, DataError, FaultModelError
from flipproof.faults.models import FaultModel
from flipproof.faults.neuron_sites import Neurons
from flipproof.faults.neurons import NeuronSpace
from flipproof.faults.selection import FormatChoice
from flipproof.faults.sites import Parameters
from flipproof.faults.space import FaultSpace
from flipproof.metrics import Metrics, resolve
from flipproof.outcomes import Decision


def assess(
    model: nn.Module,
    *,
    data: Data,
    faults: FaultModel,
    format: FormatChoice = None,
    where: Parameters | Neurons | None = None,
    trials: int = 100,
    metrics: Metrics = ("accuracy",),
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    workers: int = 1,
    device: str | torch.device | None = None,
    margin: float | None = None,
    confidence: float = 0.95,
    output: Output = None,
    cache_bytes: int | None = None,
    progress: bool | None = None,
) -> Assessment:
    """How a model behaves when the memory that holds it loses bits.

    The fault-free (golden) run comes first; then each point of the fault model runs `trials` times: draw, inject in
    place, run all data, compare with the golden outputs, restore bit-exactly. The model is assessed in eval mode and
    given back as it came: same bits, same training flags, same device. Records depend on nothing but model, data,
    format, faults and seed: not on the number of workers, the order of trials, or interruptions. On a CPU every
    process uses one torch thread (sums are taken in one order); use `workers` for more cores.

    Args:
        model: any module that gives one class score vector, or one score, a sample.
        data: batches `(inputs, targets)`, read once and kept in memory; targets are class numbers. A tuple or list of
            inputs is passed as arguments, a mapping as keyword arguments.
        faults: what goes wrong; a sweep makes one point a value.
        format: how parameters are stored: one Format, a mapping {pattern: Format} whose first match wins (what no
            pattern matches stays outside the fault space), or None for each parameter's own float type. Formats that
            quantise change the golden run too: it then computes with what the format can represent.
        where: what can be hit: `fp.Parameters`, all by default, or `fp.Neurons`: a single upset in the output of a
            Conv, Linear or recurrent layer in each sample's inference; `format` then says how outputs are stored.
        trials: repetitions a point (the ceiling, with `margin`). Points that draw nothing at random run once.
        metrics: names ("accuracy", "auroc", "average_precision"), functions `(outputs, targets) → number`, torchmetrics
            objects, or a mapping name → function.
        seed: of all draws. The same seed draws the same bits of the same space: campaigns are paired.
        store: journal to write and resume, JSON lines. None keeps records in memory only.
        workers: processes; each trial runs in one.
        device: where to run; None is where the model is.
        margin: stop a point once the interval of every metric's mean is within ± margin, looking every 20 trials.
        confidence: of all intervals.
        output: picks the tensor to judge out of what the model returns: function, dict key or tuple index.
        cache_bytes: memory for golden activations, with which a trial starts at the first faulted layer; 0 runs every
            trial whole. None allows the size of the model's parameters, less what `format` keeps of them (a campaign
            then holds the model and one copy), but at least 16 MiB, and 256 MiB for neurons. Records do not depend on
            it.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        Records and tables.

    Raises:
        FlipproofError: one of its kinds, see `flipproof.errors`; nothing is half-written and the model is untouched.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> data = [(x, net(x).argmax(dim=1))]
        >>> result = fp.assess(net, data=data, faults=fp.BitErrorRate([1e-2, 1e-1]), trials=40)
        >>> result.golden
        {'accuracy': 1.0}
        >>> result.summary[["ber", "accuracy", "critical_total", "trials"]].round(3).shape
        (2, 4)
    """
    chosen = resolve(metrics)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"assess takes a torch.nn.Module first, got {model!r}")
    for name, value in (("trials", trials), ("workers", workers), ("seed", seed)):
        if not isinstance(cast(object, value), Integral) or isinstance(value, bool):
            raise ConfigError(f"assess takes a whole number for {name}=, got {value!r}")
    if workers < 1 or trials < 1 or seed < 0 or not 0 < confidence < 1 or (margin is not None and not 0 < margin < 1):
        raise ConfigError(
            f"assess needs workers ≥ 1, trials ≥ 1, seed ≥ 0, confidence and margin in (0, 1), got workers={workers}, "
            f"trials={trials}, seed={seed}, confidence={confidence}, margin={margin}"
        )
    if not isinstance(faults, FaultModel):
        raise FaultModelError(f"faults= takes a fault model such as fp.BitErrorRate([1e-6, 1e-5]), got {faults!r}")
    target = torch.device(device) if device is not None else _device_of(model)
    with _on_device(model, target), eval_mode(model), one_thread(target):
        points = faults.points()
        space: FaultSpace | NeuronSpace
        if isinstance(where, Neurons):
            batches = read_batches(data, target)
            space = neuron_space(model, batches, where, format, output)
            for point in points:
                space.check(point)
        else:
            space = FaultSpace(model, where=where, format=format)
            for point in points:
                point.check(space)
            batches = read_batches(data, target)
        make = NeuronTrialRunner if isinstance(space, NeuronSpace) else TrialRunner
        with space.stored():
            golden = golden_run(model, batches, output)
            decision = Decision.from_golden(golden)
            check_labels(batches.targets, decision.classes)
            runner = make(model, space, points, batches, output, chosen, golden, decision, seed, target)
            found = {metric.name: metric.measure(golden, batches.targets, decision) for metric in chosen}
            header = _header(runner, space, faults, found, where or Parameters(), trials, margin, confidence)
            journal = Journal(store) if store is not None else None
            with _writing(journal, header) as done:
                records = {(r.point, r.trial): r for r in planned(done, trials)}
                runner.suffixes = _prepare_suffixes(runner, cache_bytes)
                _fill(runner, records, journal, trials, workers, margin, confidence, progress)
    return Assessment(header, answer(list(records.values()), header["plan"], list(found)))


def _writing(journal: Journal | None, header: dict[str, Any]) -> AbstractContextManager[list[Trial]]:
    return nullcontext([]) if journal is None else journal.writing(header)


def _fill(
    runner: TrialRunner,
    records: dict[Job, Trial],
    journal: Journal | None,
    trials: int,
    workers: int,
    margin: float | None,
    confidence: float,
    progress: bool | None,
) -> None:
    """Run whatever the records still lack."""
    ceilings = [1 if runner.repeats(point) else trials for point in runner.points]
    labels = [" ".join(f"{k} {v:g}" for k, v in point.coordinates().items()) for point in runner.points]

    def run(jobs: Iterator[Job], executor: Executor, step: Step) -> None:
        for trial in executor.run(jobs):
            if journal:
                journal.append(trial)
            records[trial.point, trial.trial] = trial
            step(labels[trial.point])

    with executor(runner, workers) as pool, progress_bar(sum(ceilings), len(records), show=progress) as step:
        if margin is None:
            everything = ((p, t) for p, ceiling in enumerate(ceilings) for t in range(ceiling))
            run((job for job in everything if job not in records), pool, step)
            return
        for p, ceiling in enumerate(ceilings):
            for wave in range(0, ceiling, CHECK_EVERY):
                upto = min(wave + CHECK_EVERY, ceiling)
                run((job for job in [(p, t) for t in range(wave, upto)] if job not in records), pool, step)
                names = [metric.name for metric in runner.metrics]
                if upto < ceiling and narrow([records[p, t] for t in range(upto)], names, margin, confidence):
                    step(labels[p], ceiling - upto)
                    break


def _prepare_suffixes(runner: TrialRunner, cache_bytes: int | None) -> Suffixes | None:
    """Cached prefixes, if this campaign's faults leave enough of a prefix to be worth it."""
    budget = runner.cache_bytes if cache_bytes is None else cache_bytes
    if budget <= 0:
        return None
    suffixes = Suffixes.trace(runner.model, runner.batches.inputs)
    return suffixes if suffixes is not None and runner.prepare(suffixes, budget) else None


def _header(
    runner: TrialRunner,
    space: FaultSpace | NeuronSpace,
    faults: FaultModel,
    golden: dict[str, float],
    where: Parameters | Neurons,
    trials: int,
    margin: float | None,
    confidence: float,
) -> dict[str, Any]:
    """The journal's first line: what is assessed, and what it does without faults."""
    for name, value in golden.items():
        if not isfinite(value):
            raise DataError(f"the metric {name} is {value} on the golden run; a drop from that would mean nothing")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": {
            "model": f"{type(runner.model).__module__}.{type(runner.model).__qualname__}",
            "structure": _hash(sub(" at 0x[0-9a-f]+", "", repr(runner.model)).encode()),  # addresses differ every run
            "weights": _weights_digest(runner.model, space),
            "data": runner.batches.digest(),
            "samples": runner.batches.samples,
            "faults": repr(faults),
            "where": repr(where),
            "format": _hash(repr([(s.name, s.shape, repr(s.format)) for s in space.sites]).encode()),
            "bits": space.bits,
            "metrics": [metric.name for metric in runner.metrics],
            "seed": runner.seed,
            "device": runner.device.type,
            "output": _name_of(runner.output),
        },
        "golden": golden,
        "decision": {"outputs": runner.decision.outputs, "threshold": runner.decision.threshold},
        "points": [
            {"faults": repr(p), "coordinates": p.coordinates(), "repeats": runner.repeats(p)} for p in runner.points
        ],
        "stored": [
            {"name": s.name, "kind": s.kind, "values": s.values, "format": repr(s.format), "bits": s.bits}
            for s in space.sites
        ],
        "left_out": space.left_out,
        "plan": {"trials": trials, "margin": margin, "confidence": confidence},
        "versions": versions(),
    }


def _weights_digest(model: nn.Module, space: FaultSpace | NeuronSpace) -> str:
    """A hash of every parameter and buffer, as the user gave them (not as a format decodes them)."""
    state = blake2b(digest_size=16)
    originals = space.originals()
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        state.update(name.encode())
        state.update(tensor_bytes(originals.get(name, tensor)))
    return state.hexdigest()


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def _name_of(output: Output) -> str | int | None:
    return getattr(output, "__qualname__", type(output).__name__) if callable(output) else output


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


class _on_device:
    """The model on a device for a while; parameters go back to the very memory they came from."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._home: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        if all(t.device.type == self._device.type and self._device.index in (None, t.device.index) for t in tensors):
            return
        self._home = [(t, t.data) for t in tensors]
        try:
            self._model.to(self._device)
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *exception: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for tensor, data in self._home:
            tensor.data = data
        self._home = []
