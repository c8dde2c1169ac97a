"""Bounds in one pass over memory, where torch takes three to six: on one CPU thread, as campaigns run."""

from __future__ import annotations

import sys
import threading
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
    if not _usable(x, threshold):
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
    out = _room_for(x)
    if per_neuron:
        _by_neuron(values, top, zero, out.view(-1).numpy())
    else:
        _by_span(values, top, span, zero, out.view(-1).numpy())
    return out


def bounded_between(x: Tensor, low: Tensor, high: Tensor, *, zero: bool) -> Tensor | None:
    """`x` where low ≤ x ≤ high, beyond it the bound that it crossed, or 0 with `zero`; None where torch has to do it.

    As `bounded_relu`, for bounds of the whole layer, or a channel's wherever it counts: of shape (C, 1, …), for the
    last dimensions of `x`. NaN gives 0, ±∞ what lies beyond; where a fault made a bound NaN everything is 0.
    """
    if not _usable(x, low, high) or low.shape != high.shape:
        return None
    channels, places = high.shape[:1].numel(), x.shape[x.dim() - high.dim() + 1 :] if high.dim() else x.shape
    fits = high.dim() <= x.dim() and high.shape[1:].numel() == 1
    if not fits or (high.dim() and x.shape[-high.dim()] != channels):
        return None
    top, bottom = high.detach().reshape(-1).numpy(), low.detach().reshape(-1).numpy()
    broken = np.isnan(top) | np.isnan(bottom)
    top = np.where(broken, np.float32(0), np.minimum(top, np.float32(_LARGEST)))
    bottom = np.where(broken, np.float32(0), np.maximum(bottom, np.float32(-_LARGEST)))
    if not zero:  # what is put in has to be finite
        top, bottom = np.maximum(top, np.float32(-_LARGEST)), np.minimum(bottom, np.float32(_LARGEST))
    out = _room_for(x)
    span = places.numel()
    if span == 1 and channels > 1:
        _between_by_row(x.view(-1).numpy(), bottom, top, zero, out.view(-1).numpy())
    else:
        _between_by_span(x.view(-1).numpy(), bottom, top, span, zero, out.view(-1).numpy())
    return out


def _usable(x: Tensor, *bounds: Tensor) -> bool:
    """Whether a kernel may read these."""
    if not is_plain(x) or not x.is_contiguous():  # asked first: a traced value has no dtype to compare
        return False
    alike = all(bound.dtype == x.dtype and bound.device == x.device for bound in bounds)
    return alike and torch.get_num_threads() == 1 and x.numel() > 0


_SMALLEST, _MOST = 2**17, 2**27
"""Bytes of outputs below which the allocator has pages at hand, and of all that are kept here."""
_kept: list[Any] = []
_lock = threading.Lock()


def _room_for(x: Tensor) -> Tensor:
    """An uninitialised tensor like a contiguous `x`, in the memory of an earlier one that nobody holds any more.

    Memory that the allocator gives back to the kernel comes back as pages that have to be cleared first, and clearing
    them costs more than a bound. A tensor made of a NumPy array holds it as long as any tensor, view or storage lives,
    so the array's reference count says whether it is free.
    """
    if x.nbytes < _SMALLEST or not _lock.acquire(blocking=False):  # a child may be forked while it is taken
        return torch.empty_like(x)
    try:
        for i in range(len(_kept)):
            if _kept[i].size == x.numel() and _references(_kept, i) == _FREE:
                _kept.append(_kept.pop(i))  # the one that is longest unused comes first
                return torch.from_numpy(_kept[-1]).view(x.shape)
        buffer = _aligned(x.numel())
        _kept.append(buffer)
        while sum(kept.nbytes for kept in _kept) > _MOST:
            del _kept[0]  # whoever still holds it keeps it alive
        return torch.from_numpy(buffer).view(x.shape)
    finally:
        _lock.release()


def _references(kept: list[Any], i: int) -> int:
    return sys.getrefcount(kept[i])


def _aligned(size: int) -> Any:
    """Room for so many float32 that begins a cache line, as torch's own does."""
    raw = np.empty(size + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + size]


_FREE = _references([_aligned(1)], 0)
"""References to a kept array that nobody else holds, as this interpreter counts them."""

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


@kernel(error_model="numpy")
def _between_by_span(x: Any, low: Any, top: Any, span: int, zero: bool, out: Any) -> None:
    """Two bounds for each `span` values, again and again."""
    for k in range(x.size // span):
        b, t = low[k % top.size], top[k % top.size]
        below, beyond = _instead(b, zero), _instead(t, zero)
        here, there = x[k * span : (k + 1) * span], out[k * span : (k + 1) * span]
        for i in range(span):
            there[i] = _between(here[i], b, t, below, beyond)


@kernel(error_model="numpy")
def _between_by_row(x: Any, low: Any, top: Any, zero: bool, out: Any) -> None:
    """Two bounds for each value of a row."""
    below = np.array([_instead(b, zero) for b in low])
    beyond = np.array([_instead(t, zero) for t in top])
    for k in range(x.size // top.size):
        here, there = x[k * top.size : (k + 1) * top.size], out[k * top.size : (k + 1) * top.size]
        for i in range(top.size):
            there[i] = _between(here[i], low[i], top[i], below[i], beyond[i])


@kernel(inline="always", error_model="numpy")
def _between(v: Any, b: Any, t: Any, below: Any, beyond: Any) -> Any:
    w = v if v <= t else beyond
    w = w if w >= b else below  # in this order, as torch clamps where a fault has the bounds cross
    return w if v == v else np.float32(0)


@kernel(error_model="numpy")
def _instead(bound: Any, zero: bool) -> Any:
    return np.float32(0) if zero else bound
