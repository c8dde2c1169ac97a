"""Outputs of layers as places for bounds: convolutions, linear and normalisation layers get a child behind them.

An activation is a module or can be made one. A layer's output has nothing behind it to replace, so the layer itself
lets its output through a child, `fence`. It stays an instance of its own class, with its parameters, hooks and
`state_dict` names; only `forward` is another. An activation of another library does so too, through `bounded`.
"""

from __future__ import annotations

import copyreg
import pickle
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from flipproof.hardening.bounds.activations import Activation
from flipproof.hardening.rewriting._tracing import BoundedForward

CHILD = "fence"
"""Name of the child that a layer's output passes through."""
BOUNDED = "bounded"
"""And that of an activation."""


class _Passing(nn.Module):
    """Mixed into the class of a module whose output passes through a child; can be copied and pickled."""

    _plain: ClassVar[type[nn.Module]]
    _mixin: ClassVar[type[_Passing]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the plain class, which is what a file can name."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] not in (copyreg.__newobj__, copyreg.__reduce_ex__):  # type: ignore[attr-defined]
            raise pickle.PicklingError(
                f"{self._plain.__qualname__} pickles itself in its own way, which would lose the bounds; "
                f"save the hardened model's state_dict instead"
            )
        return _revive, (self._plain, self._mixin), self.__getstate__()  # type: ignore[no-untyped-call]


class Fenced(_Passing):
    """Mixed into the class of a layer whose output passes through its child `fence`."""

    fence: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own output, bounded."""
        bounded: Tensor = self.fence(super().forward(*args, **kwargs))
        return bounded


class Enclosed(_Passing):
    """Mixed into the class of an activation whose output passes through its child `bounded`."""

    bounded: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The activation's own output, bounded."""
        bounded: Tensor = self.bounded(super().forward(*args, **kwargs))
        return bounded


_CLASSES: dict[tuple[type[nn.Module], type[_Passing]], type[nn.Module]] = {}


def _passing(plain: type[nn.Module], mixin: type[_Passing]) -> type[nn.Module]:
    """The class of such modules of a class: one for each, so that layers of one type still are of one type."""
    if (plain, mixin) not in _CLASSES:
        namespace = {
            "__module__": plain.__module__,  # torch.fx takes layers of torch.nn as wholes
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "_plain": plain,
            "_mixin": mixin,
        }
        _CLASSES[plain, mixin] = type(plain.__name__, (mixin, plain), namespace)
    return _CLASSES[plain, mixin]


def _revive(plain: type[nn.Module], mixin: type[_Passing]) -> nn.Module:
    kind = _passing(plain, mixin)
    return kind.__new__(kind)


def channel_axis(layer: nn.Module) -> int | None:
    """The dimension of a layer's output that counts channels, from the end if negative; None if it is no such layer.

    Example:
        >>> channel_axis(nn.Conv2d(1, 4, 3)), channel_axis(nn.Linear(2, 2)), channel_axis(nn.BatchNorm1d(4))
        (-3, -1, 1)
    """
    if isinstance(layer, _ConvNd):
        return -1 - len(layer.kernel_size)
    if isinstance(layer, (nn.Linear, nn.Bilinear)):
        return -1
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return -len(layer.normalized_shape)
    if isinstance(layer, (_NormBase, nn.GroupNorm)):  # batch and instance normalisation
        return 1
    return None


def why_not(layer: nn.Module) -> str | None:
    """Why a layer cannot be fenced; None if it can."""
    if isinstance(layer, BoundedForward):
        return "computes activations in its own forward; their bounds are the ones that it has"
    if "forward" in vars(layer):
        return "has a forward set on the instance"
    if hasattr(layer, CHILD):
        return f"has an attribute {CHILD!r} of its own"
    return None


def fence(layer: nn.Module) -> None:
    """Let a layer's output pass through a child, which does nothing yet."""
    place = Activation("identity")
    place.training = layer.training
    layer.__class__ = _passing(type(layer), Fenced)
    layer.add_module(CHILD, place)


def enclose(activation: nn.Module) -> Activation:
    """Let the output of an activation of another library pass through a child, which does nothing yet."""
    place = Activation("identity")
    place.training = activation.training
    activation.__class__ = _passing(type(activation), Enclosed)
    activation.add_module(BOUNDED, place)
    return place


def unfence(layer: nn.Module) -> None:
    """Take `fence` back."""
    assert isinstance(layer, Fenced)
    del layer._modules[CHILD]
    module: nn.Module = layer
    module.__class__ = layer._plain
