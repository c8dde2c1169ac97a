"""What computed a tensor: a sigmoid or softmax, a linear layer, or anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.overrides import TorchFunctionMode

Source = Literal["squashing", "linear", "other"]

_SQUASHING = ("sigmoid", "sigmoid_", "expit", "softmax", "hardsigmoid", "hardsigmoid_", "special_softmax")
_LINEAR = ("linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "einsum", "bilinear")
_HANDED_ON = (
    *("__getitem__", "squeeze", "unsqueeze", "reshape", "view", "flatten", "unflatten", "select", "narrow", "gather"),
    *("index_select", "masked_select", "transpose", "permute", "movedim", "t", "contiguous", "clone", "detach", "to"),
    *("float", "double", "half", "bfloat16", "cpu", "cuda", "cat", "concat", "stack", "take", "take_along_dim"),
    *("clamp", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_", "nan_to_num", "nan_to_num_", "where"),
)
"""Functions that move values, or cut them off, without computing others."""
_JOINING = ("cat", "concat", "stack")


class Sources(TorchFunctionMode):
    """Context that notes which tensors a sigmoid, a softmax or a linear layer gave, also when they are cut or reshaped.

    Example:
        >>> import torch
        >>> with Sources() as sources:
        ...     made = torch.sigmoid(torch.zeros(3, 1)).squeeze(1)
        >>> sources.of(made), sources.of(torch.zeros(3))
        ('squashing', 'other')
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Source]] = {}  # the tensor is kept: an id is given again once it is gone

    def of(self, tensor: Tensor) -> Source:
        """What computed a tensor."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None else "other"

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").partition(".")[0]
        if isinstance(result, Tensor):
            if name in _SQUASHING:
                self._known[id(result)] = (result, "squashing")
            elif name in _LINEAR or name.startswith("conv"):
                self._known[id(result)] = (result, "linear")
            elif name in _HANDED_ON:
                found = [self.of(leaf) for leaf in _tensors(args) if leaf.is_floating_point()]
                made: Source = next((source for source in found if source != "other"), "other")
                if name in _JOINING and len(set(found)) > 1:
                    made = "other"
                self._known[id(result)] = (result, made)
            else:
                self._known.pop(id(result), None)  # in place
        return result


def _tensors(args: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            leaves.append(arg)
        elif isinstance(arg, (list, tuple)):
            leaves += _tensors(arg)
    return leaves
