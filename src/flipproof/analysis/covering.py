"""How much of a network an analysis speaks of, and what it leaves out."""

from __future__ import annotations

from torch import nn

from flipproof.analysis.probing import Prober
from flipproof.analysis.weights import WeightProber


def spoken_of(model: nn.Module, prober: Prober | WeightProber) -> tuple[float, dict[str, str]]:
    """What all that can be asked here covers.

    Returns:
        The coverage: of neurons, multiply-accumulates of the first batch made while a layer ran that can be asked
        about ÷ all multiply-accumulates; of parameters, their bits ÷ these and the bits of what is left out, in its own
        type. And by name what is left out, with reasons.
    """
    left_out = dict(prober.space.left_out)
    if isinstance(prober, Prober):
        share, rest = prober.multiplications.coverage(prober.sites)
        return share, {**rest, **left_out}
    known = getattr(prober.space, "coverage", None)
    if known is not None:
        return float(known), left_out
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    outside = sum(8 * named[name].numel() * named[name].element_size() for name in left_out if name in named)
    return prober.space.bits / (prober.space.bits + outside), left_out
