"""Activation functions with an upper bound λ that is stored with the model (Mousavi et al. 2024, sections III and V).

Every bound leaves only finite values: NaN, −∞ and +∞ at the input come out finite, always, and so they do where a
fault turned the bound itself into NaN, ±∞ or a negative number. What they become is in the table:

`ClampInput` bounds the input instead and gives act(low) for NaN and −∞, act(λ) for +∞.

============  ==============  ===========  ==========================================================
input         Saturate        ZeroAbove    Smooth
============  ==============  ===========  ==========================================================
NaN           0               0            0
+∞            λ               0            0
−∞            0 (or `low`)    0            0 (or `low`)
threshold
============  ==============  ===========  ==========================================================
NaN           everything 0    everything 0  as λ = 0
+∞            no bound, but   no bound, but  no bound, but +∞ → 0
              +∞ → largest    +∞ → 0
              finite value
negative      everything 0    everything 0  nearly 0
============  ==============  ===========  ==========================================================

Thresholds are parameters, hence in the fault space, and do not require gradients unless a method trains them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.hardening.bounds.activations import Activation
from flipproof.hardening.bounds.clamping import bounded_between, bounded_relu


class Bounded(Activation, ABC):
    """An activation whose output a stored threshold bounds.

    Args:
        threshold: λ, a scalar or one value a neuron: the shape of the output without its batch dimension.
        function: the activation, or "identity".
        low: lower bound, of the same kind, for activations that are not ReLU. None leaves the lower side alone.
        arguments: see `Activation`.
        inplace: see `Activation`.
        weight: see `Activation`.

    Raises:
        ValueError: if a bound is not floating point, or ReLU is given a lower one.
    """

    constants: ClassVar[tuple[str, ...]] = ()
    """What else the kind takes by keyword, each a positive number that is an attribute: files keep it."""

    def __init__(
        self,
        threshold: Tensor | float,
        function: str = "relu",
        *,
        low: Tensor | float | None = None,
        arguments: Mapping[str, Any] | None = None,
        inplace: bool = False,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__(function, arguments=arguments, inplace=inplace, weight=weight)
        if low is not None and self.rectifies:
            raise ValueError(f"the output of relu is never below 0; low={low} would be a stored value without a use")
        self.threshold = _stored(threshold)
        self.low: nn.Parameter | None
        self.register_parameter("low", None if low is None else _stored(low))

    @abstractmethod
    def bound(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """The bounded activation of `x`; with `overwrite`, the memory of `x` may be used for it."""

    def _finite(self, x: Tensor, *, below: float | None, overwrite: bool) -> Tensor:
        """The activation, not in the memory of `x` unless told so, with NaN and +∞ as 0 and −∞ as `below`.

        None for `below` makes it the lowest number.
        """
        if self.rectifies:
            return (x.nan_to_num_(0.0, 0.0, 0.0) if overwrite else torch.nan_to_num(x, 0.0, 0.0, 0.0)).relu_()
        return torch.nan_to_num(self.activate(x), 0.0, 0.0, below)

    def forward(self, x: Tensor) -> Tensor:
        """Bounded activation of `x`, shape (N, …)."""
        if not self.inplace:
            return self.bound(x)
        # the result goes where the replaced function put it; backward still needs the old values
        overwrite = self.rectifies and not torch.is_grad_enabled()
        return self.bound(x, overwrite=True) if overwrite else x.copy_(self.bound(x.clone()))

    def extra_repr(self) -> str:
        """The activation and the shape of its bounds."""
        shape = "per layer" if self.threshold.dim() == 0 else f"per neuron {tuple(self.threshold.shape)}"
        return f"{super().extra_repr()}, {shape}"


class Saturate(Bounded):
    """min(act(x), λ), and no less than `low`: values beyond a bound take its value.

    Example:
        >>> Saturate(2.0)(torch.tensor([-1.0, 1.0, 5.0, float("inf"), float("nan")]))
        tensor([0., 1., 2., 2., 0.])
    """

    def bound(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        if self.rectifies:
            one_pass = bounded_relu(x, self.threshold, zero=False, overwrite=overwrite)
            if one_pass is not None:
                return one_pass
            # the order matters: a NaN threshold gives NaN first, a negative one a negative number
            capped = x.clamp_max_(self.threshold) if overwrite else torch.clamp_max(x, self.threshold)
            return capped.nan_to_num_(0.0).relu_()
        value = self.activate(x)
        one_pass = None if self.low is None else bounded_between(value, self.low, self.threshold, zero=False)
        if one_pass is not None:
            return one_pass
        capped = torch.clamp_max(value, self.threshold)
        return (capped if self.low is None else capped.clamp_min_(self.low)).nan_to_num_(0.0)


class ZeroAbove(Bounded):
    """act(x) where low ≤ act(x) ≤ λ, else 0: values beyond a bound are taken for faults.

    Example:
        >>> ZeroAbove(2.0)(torch.tensor([-1.0, 1.0, 5.0, float("inf"), float("nan")]))
        tensor([0., 1., 0., 0., 0.])
    """

    def bound(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        one_pass = bounded_relu(x, self.threshold, zero=True, overwrite=overwrite) if self.rectifies else None
        if one_pass is not None:
            return one_pass
        if self.low is not None:
            value = self.activate(x)
            one_pass = bounded_between(value, self.low, self.threshold, zero=True)
            if one_pass is not None:
                return one_pass
            value = torch.nan_to_num(value, 0.0, 0.0, 0.0)
        else:
            value = self._finite(x, below=0.0, overwrite=overwrite)
        # the comparison is written as a number: mixing bytes and floats costs three times as much
        inside = value.detach().clone().le_(self.threshold)
        if self.low is not None:
            inside = inside * (value >= self.low)
        return _product(value, inside, overwrite)


class ClampInput(Bounded):
    """act(min(max(x, low), λ)): the activation's *input* is kept in its range, as AVC does it (lstm-clipping, III-B).

    A NaN takes the lower bound: a gate closes. Behind an activation that stays in place ("identity") the output is
    clamped instead, which is the same for every activation that rises throughout.

    Example:
        >>> ClampInput(2.0, "tanh", low=-1.0)(torch.tensor([-9.0, 0.5, 9.0, float("inf"), float("nan")]))
        tensor([-0.7616,  0.4621,  0.9640,  0.9640, -0.7616])
    """

    def limits(self) -> tuple[Tensor, Tensor]:
        """(lower, upper) bound of the input; always finite, whatever a fault did to the stored ones."""
        high = torch.nan_to_num(self.threshold)
        if self.low is None:
            return (
                torch.zeros_like(high) if self.rectifies else torch.full_like(high, torch.finfo(high.dtype).min)
            ), high
        return torch.nan_to_num(self.low), high

    def bound(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        low, high = self.limits()
        x = torch.where(x > low, x, low)  # not `clamp`, which hands NaN on
        return self.activate(torch.where(x < high, x, high))


class Smooth(Bounded):
    """HyReLU, and FitAct's function: max(0, x · (1 − σ(k (x − λ)))), which training can follow.

    Equation (5) as printed has λ − x and so suppresses what lies *below* λ; this is the form that the paper's text
    and figures describe. At x = λ it is λ / 2. With other activations act(x) takes the place of max(0, x).

    Args:
        threshold: λ.
        function: the activation.
        slope: k.
        low: see `Bounded`.
        arguments: see `Activation`.
        inplace: see `Activation`.
        weight: see `Activation`.

    Example:
        >>> Smooth(2.0)(torch.tensor([-1.0, 1.0, 2.0, 5.0, float("inf")]))
        tensor([0.0000e+00, 1.0000e+00, 1.0000e+00, 4.3783e-26, 0.0000e+00])
    """

    constants: ClassVar[tuple[str, ...]] = ("slope",)

    def __init__(
        self,
        threshold: Tensor | float,
        function: str = "relu",
        *,
        slope: float = 20.0,
        low: Tensor | float | None = None,
        arguments: Mapping[str, Any] | None = None,
        inplace: bool = False,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__(threshold, function, low=low, arguments=arguments, inplace=inplace, weight=weight)
        if not slope > 0:
            raise ValueError(f"the slope k must be positive, got {slope}: a negative one suppresses what lies below λ")
        self.slope = float(slope)

    def bound(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        value = self._finite(x, below=0.0 if self.low is None else None, overwrite=overwrite)
        if self.low is not None:
            value = torch.clamp_min(value, torch.nan_to_num(self.low, 0.0))
        # 1 − σ(z) = σ(−z), without the cancellation; x = +∞ is 0 already, since ∞ · 0 would be NaN
        gate = torch.sub(torch.nan_to_num(self.threshold, 0.0), value).mul_(self.slope).sigmoid_()
        return _product(value, gate, overwrite)

    def extra_repr(self) -> str:
        """The activation, the shape of its bounds and k."""
        return f"{super().extra_repr()}, slope={self.slope:g}"


def _product(value: Tensor, gate: Tensor, overwrite: bool) -> Tensor:
    """Value · gate, in the memory of one of them unless backward will need it."""
    if torch.is_grad_enabled():
        return value * gate
    return value.mul_(gate) if overwrite else gate.mul_(value)


def _stored(value: Tensor | float) -> nn.Parameter:
    tensor = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
    if not tensor.is_floating_point():
        raise ValueError(f"a threshold must be floating point, got {tensor.dtype}")
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
