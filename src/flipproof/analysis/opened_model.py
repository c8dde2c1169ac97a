"""A model opened for an analysis: checked, stored in its formats, with its golden run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from flipproof._interrupts import given_back
from flipproof.analysis.neuron_probes import NeuronProber
from flipproof.analysis.parameter_probes import ParameterProber
from flipproof.analysis.probes import Prober, stateful
from flipproof.errors import ConfigError, ModelError
from flipproof.formats import Format
from flipproof.running.data import Data, Output
from flipproof.running.decision import Decision
from flipproof.running.device import check_device, on_device
from flipproof.running.evaluation import eval_mode, golden_run, one_thread
from flipproof.running.neurons import neuron_space
from flipproof.running.snapshots import Snapshot
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import Classification
from flipproof.running.tasks.recognise import read
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice


@contextmanager
def opened(
    model: nn.Module,
    data: Data,
    where: Neurons | Parameters,
    format: FormatChoice,
    output: Output,
    max_bytes: int,
    task: Task | None = None,
    *,
    device: str | torch.device | None = None,
) -> Iterator[Prober]:
    """Probes of a model's neurons or parameters, while it is stored in their formats; it comes back as it was.

    Args:
        model: see `analyze`.
        data: see `analyze`.
        where: see `analyze`.
        format: see `analyze`.
        output: see `analyze`.
        max_bytes: bound on the activations of a probing batch.
        task: what the model is for; see `analyze`.
        device: see `analyze`.

    Raises:
        FlipproofError: as `assess` does, if the model rejects the data or its fault-free outputs hold NaN.
        ModelError: naming what the model writes while it answers.
        FaultSpaceError: if nothing can be asked about.
    """
    target = check_device(model, device)
    with given_back(model), on_device(model, target), eval_mode(model), one_thread(target):
        batches, known, reading = read(model, data, target, task, output)
        space = (
            _even(FaultSpace(model, where=where, format=format))
            if isinstance(where, Parameters)
            else neuron_space(model, batches, where, format, reading)
        )
        with space.stored():
            state = Snapshot(model)
            golden = golden_run(model, batches, reading, state)
            if state.written:
                raise ModelError(stateful(state.written, "in every forward"))
            judge = known.judge(model, batches, reading, golden)
            prober: Prober
            if isinstance(space, FaultSpace):
                prober = ParameterProber(model, space, batches, reading, golden, judge, max_bytes, state)
            else:
                prober = NeuronProber(model, space, batches, reading, golden, judge, max_bytes, state)
            if isinstance(known, Classification) and isinstance(judge, Decision):
                known = replace(known, decision=judge.choice)
            prober.task = known
            yield prober
            prober.check_untouched()


def _even(space: FaultSpace) -> FaultSpace:
    """The space, if all words of a parameter are equally wide."""
    for site in space.sites:
        if not site.is_even:
            raise ConfigError(
                f"{site.name} is stored as {site.format!r}, whose words differ in width within a block; an analysis "
                f"asks about every bit of equally wide words. Measure such storage with assess"
            )
        if site.format.stored_constants:
            raise ConfigError(
                f"{site.name} is stored as {site.format!r}, which keeps constants of the tensor in words of their own; "
                f"an analysis asks about the bits of values. Measure such storage with assess"
            )
    return space


def check_subject(
    verb: str, model: object, where: object, kinds: tuple[type[Neurons | Parameters], ...], format: object
) -> None:
    """Refuse a model, places or formats that no analysis works on.

    Args:
        verb: the function that was called.
        model: has to be a `torch.nn.Module` that runs in Python.
        where: has to be of one of these kinds.
        kinds: of `where=`.
        format: has to be a Format, `{pattern: Format}` or None.

    Raises:
        ConfigError: saying what was expected and what came.
        ModelError: naming the module that cannot be watched.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{verb} takes a torch.nn.Module, got {_described(model)}")
    if not isinstance(where, kinds):
        expected = " or ".join(f"fp.{kind.__name__}(…)" for kind in kinds)
        raise ConfigError(f"{verb} takes where={expected}, got {_described(where)}")
    formats = list(format.values()) if isinstance(format, Mapping) else [] if format is None else [format]
    if wrong := [one for one in formats if not isinstance(one, Format)]:
        raise ConfigError(
            f"{verb} takes format= a format such as fp.Float16(), {{pattern: format}} or None, got "
            f"{_described(wrong[0])}"
        )
    scripted = next(
        (name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None
    )
    if scripted is not None:
        raise ModelError(
            f"{verb} cannot look into {scripted or 'this model'}: it is a TorchScript module, which runs without "
            f"Python; pass the torch.nn.Module that torch.jit.script or torch.jit.trace was given"
        )


def _described(thing: object) -> str:
    return f"a {type(thing).__name__}: {thing!r}" if isinstance(thing, (str, Neurons, Parameters)) else repr(thing)
