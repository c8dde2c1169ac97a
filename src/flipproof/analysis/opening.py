"""A model opened for questions: stored in its formats, with its golden run, and what a question costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flipproof.analysis.multiplications import Multiplications
from flipproof.analysis.probing import Prober
from flipproof.analysis.weights import WeightProber
from flipproof.campaigns.batches import Data, Output, read_batches
from flipproof.campaigns.evaluation import eval_mode, golden_run, one_thread
from flipproof.campaigns.neuron_trial import neuron_space
from flipproof.faults.neuron_sites import Neurons, NeuronSite
from flipproof.faults.selection import FormatChoice
from flipproof.faults.sites import Parameters
from flipproof.faults.space import FaultSpace
from flipproof.outcomes import Decision


@contextmanager
def opened(
    model: nn.Module, data: Data, where: Neurons | Parameters, format: FormatChoice, output: Output, max_bytes: int
) -> Iterator[Prober | WeightProber]:
    """Probes of a model's neurons or parameters, while it is stored in their formats; it comes back as it was.

    Raises:
        FlipproofError: as `assess` does, if the model rejects the data or its fault-free outputs hold NaN.
        FaultSpaceError: if nothing can be asked about.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with eval_mode(model), one_thread(device):
        batches = read_batches(data, device)
        space = (
            FaultSpace(model, where=where, format=format)
            if isinstance(where, Parameters)
            else neuron_space(model, batches, where, format, output)
        )
        with space.stored():
            golden = golden_run(model, batches, output)
            decision = Decision.from_golden(golden)
            if isinstance(space, FaultSpace):
                yield WeightProber(model, space, batches, output, golden, decision, max_bytes)
            else:
                yield Prober(model, space, batches, output, golden, decision, max_bytes)


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
    made = Multiplications.of(model, prober.batches.inputs[0])
    shares = {}
    for site in prober.sites:
        behind = made.behind(site.layer, site.call if isinstance(site, NeuronSite) else 0)
        shares[site.name] = behind / made.total if made.total and prober.cuts(site) else 1.0
    return shares
