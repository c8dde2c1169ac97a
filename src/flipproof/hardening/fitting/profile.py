"""What passes through every activation on the calibration data: minimum and maximum, per layer, channel or neuron."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flipproof.errors import ModelError
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.rewriting.layers import channel_axis
from flipproof.hardening.rewriting.sites import ActivationSite, Rewritten
from flipproof.running.data import call
from flipproof.running.evaluation import eval_mode

Per = Literal["layer", "channel", "neuron"]


@dataclass
class Range:
    """Smallest and largest value seen at one site.

    Attributes:
        low: over the whole layer, a scalar.
        high: the same.
        neuron_low: per neuron, of the shape of one sample's activation; None where that changes from call to call.
        neuron_high: the same.
        shapes: of one sample's activation, all that were seen.
        calls: how often the site was computed.
        channel_low: per channel, (C, 1, …); None where the number of channels or dimensions changes.
        channel_high: the same.
        axis: the dimension of the whole output that counts channels, from the end if negative, where it is known:
            behind a layer. None behind activations.
    """

    low: Tensor
    high: Tensor
    neuron_low: Tensor | None
    neuron_high: Tensor | None
    shapes: set[tuple[int, ...]]
    calls: int = 1
    channel_low: Tensor | None = None
    channel_high: Tensor | None = None
    axis: int | None = None

    def finest(self, per: Per) -> Per:
        """How fine bounds can be here, at most `per`: neuron, else channel, else layer.

        A channel is the first dimension of one sample's map, with all places taken together: bounds of shape (C, 1, 1)
        for (C, H, W), (N,) for a linear layer's (N,). Maps may have any size. Of two dimensions nobody can say which
        are channels, those of a sequence (T, D) or of a 1-d map (C, L): there it is one bound for the layer. Behind a
        layer that is known (`axis`). Bounds a neuron need one size.
        """
        if per == "neuron" and self.neuron_low is not None:
            return "neuron"
        nobody_knows = self.axis is None and any(len(shape) == 2 for shape in self.shapes)
        return "layer" if per == "layer" or self.channel_low is None or nobody_knows else "channel"

    def of(self, per: Per, site: ActivationSite | None = None) -> tuple[Tensor, Tensor]:
        """(low, high) per layer, channel or neuron, as fine as `finest` says; `site` plays no part."""
        chosen = self.finest(per)
        if chosen == "neuron":
            assert self.neuron_low is not None
            assert self.neuron_high is not None
            return self.neuron_low, self.neuron_high
        if chosen == "channel":
            assert self.channel_low is not None
            assert self.channel_high is not None
            return self.channel_low, self.channel_high
        return self.low, self.high

    def include(self, other: Range) -> None:
        """Widen this range by another one of the same site."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.shapes |= other.shapes
        self.calls += other.calls
        self.neuron_low = _both(torch.minimum, self.neuron_low, other.neuron_low)
        self.neuron_high = _both(torch.maximum, self.neuron_high, other.neuron_high)
        self.channel_low = _both(torch.minimum, self.channel_low, other.channel_low)
        self.channel_high = _both(torch.maximum, self.channel_high, other.channel_high)

    def admit(self, shapes: set[tuple[int, ...]]) -> None:
        """Maps of these shapes come by too: bounds finer than all of them have in common are none."""
        self.shapes |= shapes
        if len(self.shapes) > 1:
            self.neuron_low = self.neuron_high = None
        if self.axis is None:
            kinds = len({(len(shape), shape[:1]) for shape in self.shapes})
        else:  # a layer has one number of channels, and bounds that count from the end fit any number of dimensions
            kinds = len({len(shape) for shape in self.shapes}) if self.axis >= 0 else 1
        if kinds > 1:
            self.channel_low = self.channel_high = None


def _both(extreme: Callable[[Tensor, Tensor], Tensor], one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The extreme of two, None where their shapes differ."""
    return None if one is None or other is None or one.shape != other.shape else extreme(one, other)


def profile(
    rewritten: Rewritten, calibration: Calibration, *, of: Literal["input", "output"] = "output"
) -> Mapping[ActivationSite, Range]:
    """One pass over the data; the range of every site's activation, in the order of execution.

    Sites that the data never reach are given up (`Rewritten.dismiss`): nothing is known about them.

    Args:
        rewritten: the unbounded copy.
        calibration: what to run.
        of: the activation's output, or its input (as AVC takes it).

    Raises:
        ModelError: if a site computes NaN or ±∞ without any fault, or no site is reached at all.
    """
    found = ranges_of(rewritten, calibration, of=of)
    for site in list(rewritten.sites):
        if site.module not in found:
            rewritten.dismiss(site, "is not executed on the calibration data, so nothing is known of its range")
    if not rewritten.sites:
        raise ModelError("none of this model's activations is executed on the calibration data")
    dead = [site.name for site in rewritten.sites if site.function == "relu" and float(found[site.module].high) <= 0]
    if dead and of == "output":
        raise ModelError(
            f"{', '.join(dead)}: nothing but 0 comes out on the calibration data, so thresholds would collapse to 0 "
            f"and cut everything. Is the layer dead (then it is useless), or the data not what the model was made for?"
        )
    return {site: found[site.module] for site in rewritten.sites}


def ranges_of(
    rewritten: Rewritten, calibration: Calibration, *, of: Literal["input", "output"] = "output"
) -> dict[str, Range]:
    """One pass over the data; the range at every module of a site that was executed.

    Raises:
        ModelError: if a site computes NaN or ±∞ without any fault.
    """
    found: dict[str, Range] = {}
    names = {site.module: site for site in rewritten.sites}
    layers = {site.module: rewritten.layer_of(site) for site in rewritten.sites}
    axes = {module: None if layer is None else channel_axis(layer) for module, layer in layers.items()}

    def watch(module: str) -> Any:
        def before(called: nn.Module, args: tuple[Any, ...]) -> None:  # in-place activations overwrite their input
            _note(found, names[module], args[0].detach(), axes[module])

        def after(called: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            _note(found, names[module], result.detach(), axes[module])

        place = rewritten.model.get_submodule(module)
        return place.register_forward_pre_hook(before) if of == "input" else place.register_forward_hook(after)

    handles = [watch(module) for module in names]
    try:
        with eval_mode(rewritten.model):
            for inputs in calibration.batches.inputs:
                call(rewritten.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _note(found: dict[str, Range], site: ActivationSite, values: Tensor, axis: int | None) -> None:
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ModelError(
            f"{site.name} ({site.function}) computes NaN or infinite values on the calibration data without any fault; "
            f"no bound can be read off those"
        )
    neuron_low, neuron_high = (
        (values.amin(dim=0), values.amax(dim=0)) if values.dim() and axis is None else (None, None)
    )
    channel_low, channel_high = neuron_low, neuron_high
    if axis is not None:  # nobody asks for bounds a neuron behind a layer
        channel_low, channel_high = _by_channel(values, axis)
    elif neuron_low is not None and neuron_high is not None and (places := tuple(range(1, neuron_low.dim()))):
        channel_low, channel_high = neuron_low.amin(places, keepdim=True), neuron_high.amax(places, keepdim=True)
    seen = Range(low, high, neuron_low, neuron_high, {tuple(values.shape[1:])}, 1, channel_low, channel_high, axis)
    if site.module in found:
        found[site.module].include(seen)
    else:
        found[site.module] = seen


def _by_channel(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Extremes of every channel, of shape (C, 1, …): as many ones as there are dimensions behind the channels."""
    channel = axis % values.dim()
    others = [dim for dim in range(values.dim()) if dim != channel]
    if not others:
        return values.clone(), values.clone()
    low, high = values.amin(others, keepdim=True), values.amax(others, keepdim=True)
    shape = low.shape[channel:]
    return low.reshape(shape), high.reshape(shape)
