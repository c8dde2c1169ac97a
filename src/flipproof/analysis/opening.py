"""A model opened for questions: stored in its formats, with its golden run, and what a question costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipproof._interrupts import given_back
from flipproof.analysis.multiplications import Multiplications
from flipproof.analysis.probing import Prober
from flipproof.analysis.weights import WeightProber
from flipproof.errors import ConfigError, ModelError
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Batches, Data, Output, read_batches
from flipproof.running.decision import decide
from flipproof.running.device import device_of
from flipproof.running.evaluation import eval_mode, golden_run, one_thread
from flipproof.running.neurons import neuron_space
from flipproof.running.outcomes import DecisionChoice
from flipproof.running.snapshots import Snapshot
from flipproof.running.values import rows_of
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Neurons, NeuronSite, Parameters, Site
from flipproof.spaces.tensors import FormatChoice

BATCH = 128
"""Inputs of a batch made of drawn ones."""


def drawn(batches: Batches, most: int, seed: int) -> tuple[Batches, Tensor]:
    """A random part of the inputs, so that nothing is computed about the others, and a random order of them.

    Inputs that are tensors of one shape are put into batches of `BATCH` in the order drawn. Batches of other kinds are
    thinned out where every tensor in them holds one row a sample, and else stay whole.

    Args:
        batches: all there are.
        most: how many inputs are wanted at most.
        seed: of the draw.

    Returns:
        The batches, and int64 positions in them in random order; with the first n, n inputs are drawn without
        replacement.
    """
    order = _shuffled(batches.samples, seed)
    if not all(map(_one_row_a_sample, batches.inputs, batches.sizes)):
        return batches, order[:most]
    order = order[:most]
    parts: list[Any] = []
    chosen: list[Tensor] = []
    for i, inputs in enumerate(batches.inputs):
        part = batches.part(i)
        mine = order[(order >= part.start) & (order < part.stop)]
        if mine.numel():
            parts.append(rows_of(inputs, mine - part.start, batches.sizes[i]))
            chosen.append(mine)
    together = torch.cat(chosen)
    place = torch.empty(batches.samples, dtype=torch.int64)
    place[together] = torch.arange(order.numel())
    try:
        whole = pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
    except (ValueError, RuntimeError):  # batches of different shapes stay apart
        sizes = tuple(mine.numel() for mine in chosen)
        return Batches(tuple(parts), sizes, batches.targets[together]), place[order]
    rows = torch.split(order, BATCH)
    inputs = tuple(rows_of(whole, place[some], order.numel()) for some in rows)
    return Batches(inputs, tuple(map(len, rows)), batches.targets[order]), torch.arange(order.numel())


def _shuffled(count: int, seed: int) -> Tensor:
    keys = TrialGenerator(seed, "inputs", 0).below(2**62, count)
    return torch.from_numpy(keys).argsort(stable=True)


def _one_row_a_sample(inputs: Any, size: int) -> bool:
    leaves = pytree.tree_leaves(inputs)
    return all(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size for leaf in leaves)


@contextmanager
def opened(
    model: nn.Module,
    data: Data | Batches,
    where: Neurons | Parameters,
    format: FormatChoice,
    output: Output,
    max_bytes: int,
    decision: DecisionChoice = None,
) -> Iterator[Prober | WeightProber]:
    """Probes of a model's neurons or parameters, while it is stored in their formats; it comes back as it was.

    Args:
        model: see `analyze`.
        data: see `analyze`; or batches that were read already.
        where: see `analyze`.
        format: see `analyze`.
        output: see `analyze`.
        max_bytes: bound on the activations of a probing batch.
        decision: see `analyze`.

    Raises:
        FlipproofError: as `assess` does, if the model rejects the data or its fault-free outputs hold NaN.
        ModelError: naming what the model writes while it answers.
        FaultSpaceError: if nothing can be asked about.
    """
    device = device_of(model)
    with given_back(model), eval_mode(model), one_thread(device):
        batches = data if isinstance(data, Batches) else read_batches(data, device)
        space = (
            FaultSpace(model, where=where, format=format)
            if isinstance(where, Parameters)
            else neuron_space(model, batches, where, format, output)
        )
        for site in space.sites:
            if isinstance(site, Site) and not site.is_even:
                raise ConfigError(
                    f"{site.name} is stored as {site.format!r}, whose words differ in width within a block; an "
                    f"analysis asks about every bit of equally wide words. Measure such storage with assess"
                )
        with space.stored():
            state = Snapshot(model)
            golden = golden_run(model, batches, output, state)
            if state.written:
                raise ModelError(_stateful(state.written, "in every forward"))
            rule = decide(model, batches, output, golden, decision)
            if isinstance(space, FaultSpace):
                yield WeightProber(model, space, batches, output, golden, rule, max_bytes)
            else:
                yield Prober(model, space, batches, output, golden, rule, max_bytes)
            if wrote := {*state.restore(), *state.verify()}:
                raise ModelError(_stateful(wrote, "under some error"))


def _stateful(names: set[str], when: str) -> str:
    return (
        f"the model writes {', '.join(sorted(names)[:5])} {when}, so that one question would change the answer to the "
        f"next. It was put back. Remove that state (observers, BatchNorm in train mode, max_norm), or measure with "
        f"assess, which puts it back after every batch"
    )


def by_batch(prober: Prober | WeightProber, sample: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Samples by the batch they are in: (batch, which entries of `sample`, their rows in the batch)."""
    first = 0
    for batch, size in enumerate(prober.batches.sizes):
        here = ((sample >= first) & (sample < first + size)).nonzero()[:, 0]
        if here.numel():
            yield batch, here, sample[here] - first
        first += size


def suffix_shares(model: nn.Module, prober: Prober | WeightProber) -> dict[str, float]:
    """Multiplications behind each layer ÷ those of a forward: what a probe of it costs in forwards."""
    made = prober.multiplications if isinstance(prober, Prober) else Multiplications.of(model, prober.batches.inputs[0])
    shares = {}
    for site in prober.sites:
        behind = made.behind(site.layer, site.call if isinstance(site, NeuronSite) else 0)
        shares[site.name] = behind / made.total if made.total and prober.cuts(site) else 1.0
    return shares
