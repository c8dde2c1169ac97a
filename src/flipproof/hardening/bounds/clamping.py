"""Bounded ReLU in one pass over memory, where torch takes three or four: on one CPU thread, as campaigns run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipproof._kernels import kernel


def is_plain(x: Tensor) -> bool:
    """True where values can be read from memory and nobody asks for gradients or a trace."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
    )


def bounded_relu(x: Tensor, threshold: Tensor, *, zero: bool, overwrite: bool) -> Tensor | None:
    """max(0, x) where it is at most λ, beyond it λ, or 0 with `zero`; None where torch has to do it.

    It takes float32 in one piece of memory, bounds for the whole layer, a channel or a neuron, and a single thread:
    with several, torch's passes share the work. NaN gives 0, +∞ what lies beyond λ; a threshold that a fault made NaN
    or negative makes everything 0, +∞ is taken for the largest number.
    """
    usable = is_plain(x) and x.is_contiguous() and threshold.dtype == x.dtype and threshold.device == x.device
    if not usable or torch.get_num_threads() != 1 or not x.numel():
        return None
    inner = x.shape[1:]
    if threshold.dim() and threshold.dim() != len(inner):
        return None
    per_neuron = threshold.dim() > 0 and threshold.shape == inner and threshold.numel() > 1
    leading = next((i for i, size in enumerate(threshold.shape) if size == 1), threshold.dim())
    by_channel = threshold.shape[leading:].numel() == 1 and threshold.shape[:leading] == inner[:leading]
    if not per_neuron and not by_channel:
        return None
    top = np.nan_to_num(threshold.detach().reshape(-1).numpy(), nan=-1.0, posinf=_LARGEST, neginf=-1.0)
    span = inner[leading:].numel() if threshold.dim() else inner.numel()
    values = x.view(-1).numpy()
    if overwrite:
        if per_neuron:
            _in_place_by_neuron(values, top, zero)
        else:
            _in_place_by_span(values, top, span, zero)
        return x
    out = torch.empty_like(x)
    if per_neuron:
        _by_neuron(values, top, zero, out.view(-1).numpy())
    else:
        _by_span(values, top, span, zero, out.view(-1).numpy())
    return out


_LARGEST = float(np.finfo(np.float32).max)


# written so that LLVM vectorises: two plain selects, slices of known length, and one array alone where it is in place


@kernel(error_model="numpy")
def _by_span(x: Any, top: Any, span: int, zero: bool, out: Any) -> None:
    """One threshold for each `span` values, again and again."""
    for k in range(x.size // span):
        t = top[k % top.size]
        _span(x[k * span : (k + 1) * span], t, _beyond(t, zero), out[k * span : (k + 1) * span])


@kernel(error_model="numpy")
def _in_place_by_span(x: Any, top: Any, span: int, zero: bool) -> None:
    for k in range(x.size // span):
        t = top[k % top.size]
        _in_place_span(x[k * span : (k + 1) * span], t, _beyond(t, zero))


@kernel(error_model="numpy")
def _by_neuron(x: Any, top: Any, zero: bool, out: Any) -> None:
    """A threshold for each value of a sample."""
    beyond = np.array([_beyond(t, zero) for t in top])
    for k in range(x.size // top.size):
        here, there = x[k * top.size : (k + 1) * top.size], out[k * top.size : (k + 1) * top.size]
        for i in range(top.size):
            there[i] = _bounded(here[i], top[i], beyond[i])


@kernel(error_model="numpy")
def _in_place_by_neuron(x: Any, top: Any, zero: bool) -> None:
    beyond = np.array([_beyond(t, zero) for t in top])
    for k in range(x.size // top.size):
        here = x[k * top.size : (k + 1) * top.size]
        for i in range(top.size):
            here[i] = _bounded(here[i], top[i], beyond[i])


@kernel(inline="always", error_model="numpy")
def _bounded(v: Any, t: Any, beyond: Any) -> Any:
    w = v if v <= t else beyond
    return w if v > np.float32(0) else np.float32(0)


@kernel(error_model="numpy")
def _beyond(t: Any, zero: bool) -> Any:
    return t if t > np.float32(0) and not zero else np.float32(0)


@kernel(error_model="numpy")
def _span(x: Any, t: Any, beyond: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = _bounded(x[i], t, beyond)


@kernel(error_model="numpy")
def _in_place_span(x: Any, t: Any, beyond: Any) -> None:
    for i in range(x.size):
        x[i] = _bounded(x[i], t, beyond)
