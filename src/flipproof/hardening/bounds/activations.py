"""Which functions count as activations, in each of the ways PyTorch has of calling them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "prelu": F.prelu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}
"""The activation functions that can be bounded, by name. `torch.clamp` and `torch.maximum` are not among them: nothing
tells an activation made of them from any other arithmetic."""

_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.PReLU: ("prelu", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.CELU: ("celu", ("alpha",)),
    nn.SELU: ("selu", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.Mish: ("mish", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
}


def _callables() -> dict[Any, tuple[str, bool]]:
    """Every callable that computes one of `FUNCTIONS` → (its name, whether it always works in place)."""
    found: dict[Any, tuple[str, bool]] = {}
    homes = (F, torch, torch.Tensor, torch.special)
    for name in FUNCTIONS:
        for attribute, inplace in ((name, False), (f"{name}_", True)):
            for home in homes:
                if (function := getattr(home, attribute, None)) is not None:
                    found[function] = (name, inplace)
            overloads = getattr(torch.ops.aten, attribute, None)
            if overloads is not None and hasattr(overloads, "default"):
                found[overloads.default] = (name, inplace)
    found[torch.special.expit] = ("sigmoid", False)
    return found


CALLABLES: Mapping[Any, tuple[str, bool]] = _callables()
"""``F.relu``, ``torch.relu_``, ``torch.Tensor.sigmoid``, ``torch.ops.aten.gelu.default``, …"""

METHODS: Mapping[str, tuple[str, bool]] = {
    attribute: (name, inplace)
    for name in FUNCTIONS
    for attribute, inplace in ((name, False), (f"{name}_", True))
    if hasattr(Tensor, attribute)
}
"""Names of tensor methods: ``x.relu()``, ``x.sigmoid_()``, …"""


def function_of(module: nn.Module) -> str | None:
    """The name of the activation that a module computes, None if it is no activation.

    A subclass counts as long as it inherits `forward`.

    Example:
        >>> function_of(nn.ReLU()), function_of(nn.Linear(1, 1))
        ('relu', None)
    """
    for base, (name, _) in _MODULES.items():
        if isinstance(module, base) and type(module).forward is base.forward and "forward" not in vars(module):
            if name == "hardtanh" and isinstance(module, nn.ReLU6):
                continue
            return name
    return None


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face activation: what it computes on the way is its own, its output is bounded.

    Example:
        >>> is_foreign(nn.GELU())
        False
    """
    kind = type(module)
    return kind.__module__ == "transformers.activations" and kind.__name__ != "LinearActivation"


class Activation(nn.Module):
    """An activation function by name, not bounded: what `harden` puts in place of each one that it finds.

    Args:
        function: one of `FUNCTIONS`, or "identity" where it follows an activation that stays as it is.
        arguments: its other arguments, e.g. ``{"negative_slope": 0.1}``.
        inplace: overwrite the input, as the function that it replaces did; whoever reads the input later relies on it.
        weight: the slopes of a PReLU.

    Raises:
        ValueError: if the function is unknown.
    """

    def __init__(
        self,
        function: str = "relu",
        *,
        arguments: Mapping[str, Any] | None = None,
        inplace: bool = False,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        if function != "identity" and function not in FUNCTIONS:
            raise ValueError(f"unknown activation {function!r}; known are {['identity', *FUNCTIONS]}")
        self.function = function
        self.arguments = dict(arguments or {})
        self.inplace = inplace
        self.weight: nn.Parameter | None
        self.register_parameter("weight", weight)

    @classmethod
    def of(cls, module: nn.Module) -> Activation:
        """The same function as an activation module of `torch.nn`; hooks and training flag move over."""
        name = function_of(module)
        if name is None:
            raise ValueError(f"{module!r} is no activation that can be bounded")
        attributes = next(names for _, names in _MODULES.items() if names[0] == name)[1]
        new = Activation(
            name,
            arguments={attribute: getattr(module, attribute) for attribute in attributes},
            inplace=bool(getattr(module, "inplace", False)),
            weight=module.weight if isinstance(module, nn.PReLU) else None,
        )
        return take_place(new, module)

    @property
    def rectifies(self) -> bool:
        """True for ReLU, whose output is bounded below by 0 as it is."""
        return self.function == "relu"

    def activate(self, x: Tensor) -> Tensor:
        """The activation alone, out of place; "identity" gives back `x` itself."""
        if self.function == "identity":
            return x
        if self.weight is not None:
            return F.prelu(x, self.weight)
        return FUNCTIONS[self.function](x, **self.arguments)

    def forward(self, x: Tensor) -> Tensor:
        """The activation, any shape."""
        if not self.inplace or self.function == "identity":
            return self.activate(x)
        return x.relu_() if self.rectifies else x.copy_(self.activate(x.clone()))

    def extra_repr(self) -> str:
        """What the constructor was given."""
        shown = [self.function, *(f"{name}={value!r}" for name, value in self.arguments.items())]
        return ", ".join(shown + ["inplace"] * self.inplace)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def take_place(new: Activation, old: nn.Module) -> Activation:
    """Give `new` the training flag and the hooks of the module whose place it takes."""
    take_hooks(new, old)
    return new


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give any module the training flag and the hooks of another one."""
    new.training = old.training
    for name in _HOOKS:
        if name in vars(old):
            # a copy: what takes the place of one call must not answer for the others of a shared module
            vars(new)[name] = copy(vars(old)[name])
