"""Quantised layers: which of their tensors are words, scales and zero points, wherever a library keeps them.

Libraries keep a quantised weight as plain tensors under other names: in a tensor subclass (torchao), in buffers (GPTQ,
PT2E), in objects that hang on a parameter or a module (bitsandbytes). Each of these plain tensors is a piece of memory
that the library's own kernels read, so it is hit where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flipproof.formats.integer import INTEGERS

Role = Literal["weight", "scale", "zero_point"]

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_BYTES = (torch.int8, *EIGHT_BIT_FLOATS)
_SCALES = ("scale", "absmax", "scb")
_DEPTH = 4
"""Objects in objects: a nested quantisation state of bitsandbytes is two deep."""


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor only stands for plain ones that it wraps."""
    wrapper: bool = is_traceable_wrapper_subclass(tensor)
    return wrapper


def parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor consists of, by qualified names; the tensor itself if it wraps none.

    >>> import torch
    >>> [name for name, _ in parts("weight", torch.zeros(3))]
    ['weight']
    """
    if not is_wrapper(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from parts(f"{name}.{inner}", getattr(tensor, inner))


def keeps_parts(tensor: Tensor) -> bool:
    """Whether what it wraps is memory that stays, not something that is made anew whenever it is asked for."""
    first, second = (dict(parts("", tensor)) for _ in range(2))
    return all(second.get(name) is part or _same_memory(second.get(name), part) for name, part in first.items())


def _same_memory(one: Tensor | None, other: Tensor) -> bool:
    if one is None or one.layout != torch.strided or other.layout != torch.strided:
        return False
    return one.data_ptr() == other.data_ptr() and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names, those that wrap others taken apart."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: part for whole, tensor in named for name, part in parts(whole, tensor)}


def role_of(name: str) -> Role | None:
    """What a tensor of a quantised layer is for, by its own name; None where the name says neither scale nor zero.

    >>> role_of("fc.weight.act_quant_scale"), role_of("qzeros"), role_of("weight.qdata")
    ('scale', 'zero_point', None)
    """
    own = name.rpartition(".")[2].lower()
    if any(word in own for word in _SCALES):
        return "scale"
    return "zero_point" if "zero" in own else None


def is_words(name: str, tensor: Tensor) -> bool:
    """Whether a buffer holds the words of a quantised weight.

    8-bit words of two dimensions or more do so under any name; other integers if they are called a weight.
    """
    if role_of(name) is not None:
        return False
    if tensor.dtype in _BYTES and tensor.dim() >= 2:
        return True
    return tensor.dtype in INTEGERS and "weight" in name.rpartition(".")[2]


def holds_words(name: str, tensor: Tensor) -> bool:
    """Whether a parameter is a quantised weight: it wraps other tensors, or its values are integers or 8-bit floats."""
    return is_wrapper(tensor) or tensor.dtype in (*INTEGERS, *EIGHT_BIT_FLOATS)


def attached(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in objects that hang on a module or on its parameters, by names from the module on.

    Such are the quantisation state of a bitsandbytes weight, and what its layer makes of it at its first forward. What
    a layer has under the same name as its parameter is a spare: they are one object, or a copy made them two.
    """
    registered = {"_parameters", "_buffers", "_modules"}
    seen: set[int] = set()
    for name, parameter in module._parameters.items():
        if parameter is not None and not is_wrapper(parameter):
            carried = getattr(parameter, "__dict__", {})
            registered |= carried.keys()
            yield from _inside(name, carried, seen, _DEPTH)
    own = {key: value for key, value in vars(module).items() if key not in registered and not key.startswith("_")}
    yield from _inside("", own, seen, _DEPTH)


def _inside(path: str, held: Mapping[str, object], seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    for key, value in held.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Tensor):
            yield from parts(name, value)
            continue
        if isinstance(value, (nn.Module, type)) or id(value) in seen or not depth:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            yield from _inside(name, {str(k): v for k, v in value.items()}, seen, depth - 1)
        elif isinstance(value, (list, tuple)):
            yield from _inside(name, {str(i): v for i, v in enumerate(value)}, seen, depth - 1)
        elif not callable(value) and (attributes := getattr(value, "__dict__", None)):
            yield from _inside(name, attributes, seen, depth - 1)
