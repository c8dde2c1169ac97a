"""A model opened for questions: stored in its formats, with its golden run, and what a question costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flipproof.analysis.probing import Prober
from flipproof.analysis.weights import WeightProber
from flipproof.campaigns.batches import Data, Output, call, read_batches
from flipproof.campaigns.deciding import decide
from flipproof.campaigns.evaluation import eval_mode, golden_run, one_thread
from flipproof.campaigns.neuron_trial import neuron_space
from flipproof.faults.neuron_sites import Neurons
from flipproof.faults.selection import FormatChoice
from flipproof.faults.sites import Parameters
from flipproof.faults.space import FaultSpace
from flipproof.interrupts import given_back
from flipproof.outcomes import DecisionChoice


@contextmanager
def opened(
    model: nn.Module,
    data: Data,
    where: Neurons | Parameters,
    format: FormatChoice,
    output: Output,
    max_bytes: int,
    decision: DecisionChoice = None,
) -> Iterator[Prober | WeightProber]:
    """Probes of a model's neurons or parameters, while it is stored in their formats; it comes back as it was.

    Raises:
        FlipproofError: as `assess` does, if the model rejects the data or its fault-free outputs hold NaN.
        FaultSpaceError: if nothing can be asked about.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with given_back(model), eval_mode(model), one_thread(device):
        batches = read_batches(data, device)
        space = (
            FaultSpace(model, where=where, format=format)
            if isinstance(where, Parameters)
            else neuron_space(model, batches, where, format)
        )
        with space.stored():
            golden = golden_run(model, batches, output)
            rule = decide(model, batches, output, golden, decision)
            if isinstance(space, FaultSpace):
                yield WeightProber(model, space, batches, output, golden, rule, max_bytes)
            else:
                yield Prober(model, space, batches, output, golden, rule, max_bytes)


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
    order: list[tuple[str, float]] = []
    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:

            def hook(
                module: nn.Module, args: object, result: object, name: str = name, weight: Tensor = weight
            ) -> None:
                if isinstance(result, Tensor):
                    order.append((name, result.numel() * weight[0].numel()))

            handles.append(module.register_forward_hook(hook))
    try:
        call(model, prober.batches.inputs[0])
    finally:
        for handle in handles:
            handle.remove()
    total = sum(cost for _, cost in order)
    shares = {}
    for site in prober.sites:
        place = next((i for i, (name, _) in enumerate(order) if name == site.layer), None)
        behind = sum(cost for _, cost in order[place + 1 :]) if place is not None else total
        shares[site.name] = behind / total if total and prober.cuts(site) else 1.0
    return shares
