"""The shapes of a model's inputs, kept so that it can be run again when its data is gone."""

from __future__ import annotations

from collections import OrderedDict, deque
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof._fields import Fields, whole, wrong
from flipproof.errors import ModelError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    )
}
"""Types of inputs that a file can name."""

MOST_BYTES = 2**30
"""What the inputs that a file describes may take: a shape is a few bytes in it, and they are made to run the model."""

DEEPEST, MOST_PARTS, MOST_AXES = 32, 4096, 16
"""How deep containers may lie in each other, how many containers and tensors there may be, and axes of a tensor."""


def shapes_of(inputs: Any) -> Any:
    """(shape, dtype) for each tensor; None for inputs that are more than tensors."""
    leaves, tree = pytree.tree_flatten(inputs, is_leaf=lambda node: isinstance(node, PackedSequence))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return pytree.tree_unflatten([(tuple(leaf.shape), leaf.dtype) for leaf in leaves], tree)


def flat(example: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The (shape, dtype) pairs of an example, and how they belong together."""
    return pytree.tree_flatten(example, is_leaf=_is_shape)


def inputs_like(example: Any, device: torch.device) -> Any:
    """Seeded random floats, and zeros of any other type (a valid index), of the shapes of an example."""
    generator = torch.Generator().manual_seed(0)
    leaves, tree = flat(example)
    made = []
    for shape, dtype in leaves:
        floating = dtype.is_floating_point
        tensor = torch.randn(shape, generator=generator).to(dtype) if floating else torch.zeros(shape, dtype=dtype)
        made.append(tensor.to(device))
    return pytree.tree_unflatten(made, tree)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[1], torch.dtype)


def to_plain(example: Any) -> Any:
    """An example as JSON can hold it: ``{"shape": [4, 3], "dtype": "float32"}``, in lists, tuples, deques and mappings.

    Raises:
        ModelError: if the inputs have another form, or take more than 1 GiB.

    Example:
        >>> to_plain({"tokens": ((20, 7), torch.int64)})
        {'dict': [['tokens', {'shape': [20, 7], 'dtype': 'int64'}]]}
    """
    if (size := _bytes_of(example)) > MOST_BYTES:
        raise ModelError(
            f"one calibration batch takes {size:,} bytes; a file describes up to {MOST_BYTES:,}: harden with smaller "
            f"batches"
        )
    return _plain(example)


def _plain(node: Any) -> Any:
    if _is_shape(node):
        name = str(node[1]).removeprefix("torch.")
        if name not in DTYPES:
            raise ModelError(f"this model takes inputs of {node[1]}; a file can describe {', '.join(DTYPES)}")
        return {"shape": list(node[0]), "dtype": name}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_plain(part) for part in node]}
    if type(node) is deque:
        return {"deque": [_plain(part) for part in node], "longest": node.maxlen}
    if type(node) in (dict, OrderedDict) and all(isinstance(key, (str, int)) for key in node):
        return {type(node).__name__: [[key, _plain(part)] for key, part in node.items()]}
    raise ModelError(
        f"this model takes a {type(node).__name__}; a file can describe tensors in lists, tuples, deques and mappings "
        f"whose keys are texts or whole numbers"
    )


def from_plain(value: Any, place: str) -> Any:
    """The inverse of `to_plain`, for what a file holds.

    Args:
        value: read from JSON.
        place: where it stands, for the error.

    Raises:
        ConfigError: if it is anything else, nested too deep, or describes inputs of more than 1 GiB.
    """
    example = _Reader().read(value, place, 0)
    if (size := _bytes_of(example)) > MOST_BYTES:
        raise wrong(place, f"inputs of at most {MOST_BYTES:,} bytes", size)
    return example


class _Reader:
    def __init__(self) -> None:
        self._parts = 0

    def read(self, value: Any, place: str, depth: int) -> Any:
        self._parts += 1
        if depth > DEEPEST or self._parts > MOST_PARTS:
            raise wrong(place, f"inputs of at most {MOST_PARTS:,} parts, nested at most {DEEPEST} deep", value)
        fields = Fields(value, place)
        if fields.has("shape"):
            axes = self._list(fields.take("shape"), fields.at("shape"))
            if len(axes) > MOST_AXES:
                raise wrong(fields.at("shape"), f"at most {MOST_AXES} axes", axes)
            shape = tuple(whole(size, f"{fields.at('shape')}[{i}]") for i, size in enumerate(axes))
            dtype = DTYPES[fields.text("dtype", among=DTYPES)]
            fields.end()
            return shape, dtype
        for kind in ("list", "tuple", "deque", "dict", "OrderedDict"):
            if fields.has(kind):
                content = self._list(fields.take(kind), fields.at(kind))
                return self._container(kind, content, fields, depth)
        raise wrong(place, "a shape, list, tuple, deque, dict or OrderedDict", value)

    def _container(self, kind: str, content: list[Any], fields: Fields, depth: int) -> Any:
        place = fields.at(kind)
        if kind in ("dict", "OrderedDict"):
            fields.end()
            pairs = []
            for i, pair in enumerate(content):
                known = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int))
                if not known:
                    raise wrong(f"{place}[{i}]", "a key, text or whole number, and what it stands for", pair)
                pairs.append((pair[0], self.read(pair[1], f"{place}[{i}]", depth + 1)))
            return OrderedDict(pairs) if kind == "OrderedDict" else dict(pairs)
        longest = fields.take("longest") if kind == "deque" else None
        if longest is not None:
            whole(longest, fields.at("longest"), len(content))
        fields.end()
        parts = [self.read(part, f"{place}[{i}]", depth + 1) for i, part in enumerate(content)]
        return deque(parts, longest) if kind == "deque" else tuple(parts) if kind == "tuple" else parts

    def _list(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong(place, "a list", value)
        return value


def _bytes_of(example: Any) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in flat(example)[0])
