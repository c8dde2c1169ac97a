"""Quantised weights that torch.ao keeps in objects of C++: taken apart into plain tensors, and packed again.

No byte of such an object can be written. But what it was packed of can be had from it: words, scales, zero points and
bias, as the checkpoint stores them. They are kept here as plain tensors, whose bits are hit like any others; while they
are hit, the module holds an object that torch.ao's own operators packed of them, and afterwards its own again.

The numbers that a static layer quantises its output with are Python attributes, which are set in the same way.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.spaces.quantised import Role

_QUANTISED = "torch.ao.nn."
_LINEAR, _CONV2D, _CONV3D = "LinearPackedParamsBase", "Conv2dPackedParamsBase", "Conv3dPackedParamsBase"
_EMBEDDING, _CELL = "EmbeddingPackedParamsBase", "CellParamsBase"


@dataclass
class Part:
    """One tensor of what was taken apart.

    Attributes:
        name: of it within its layer, as a checkpoint has it: "weight", "weight.scale", "bias".
        tensor: our own copy, which can be hit.
        kind: what it is for.
    """

    name: str
    tensor: Tensor
    kind: Role | str


class Unreadable:
    """Stands where torch.ao could not pack what a fault made of the numbers: the forward that uses it raises."""

    def __repr__(self) -> str:
        return "numbers that torch.ao cannot pack"  # what is raised quotes it, and records hold no addresses


@dataclass
class Packing(ABC):
    """What one attribute of a module holds, as tensors, and the way back into the module.

    Attributes:
        layer: qualified name of the layer that a user sees.
        prefix: what names of its parts begin with.
        place: qualified name of the attribute.
        module: the one that has the attribute.
        attribute: its name.
        parts: what it consists of.
        axis: along which channels of a weight have scales of their own.
        original: what the module came with.
        golden: what the module holds while no fault is in place.
    """

    layer: str
    prefix: str
    place: str
    module: nn.Module
    attribute: str
    parts: list[Part]
    axis: int = 0
    original: Any = field(init=False)
    golden: Any = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.golden = self.module.__dict__[self.attribute]

    @abstractmethod
    def packed(self) -> Any:
        """What the tensors hold now, in the form in which the module wants it."""

    def install(self) -> None:
        """Let the module use what the tensors hold now."""
        self._set(self._made())

    def settle(self) -> None:
        """Let the module use what the tensors hold now, and go back to that after faults."""
        self.golden = self._made()
        self._set(self.golden)

    def take_out(self) -> None:
        """Go back to what the module held before faults."""
        self._set(self.golden)

    def put_back(self) -> None:
        """Go back to the very object that the module came with."""
        self.golden = self.original
        self._set(self.original)

    def _made(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that such tensors are deprecated
            try:
                return self.packed()
            except (RuntimeError, ValueError, OverflowError, IndexError):  # no number that torch.ao can pack
                return Unreadable()

    def _set(self, value: Any) -> None:
        self.module.__dict__[self.attribute] = value

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by names within the layer."""
        return {part.name: part.tensor for part in self.parts}

    @property
    def bias(self) -> Tensor | None:
        """The bias of a layer; None if it has none."""
        return self.tensors().get("bias")


class _Linear(Packing):
    def packed(self) -> Any:
        return torch.ops.quantized.linear_prepack(_weight(self, "weight"), self.bias)


class _Conv(Packing):
    def packed(self) -> Any:
        ops, own = torch.ops.quantized, self.original
        rank = 3 if _class_of(own) == _CONV3D else 2
        facts = {name: getattr(ops, f"conv{rank}d_{name}")(own) for name in _FACTS}
        places = [facts["stride"], facts["padding"]]
        if facts["transpose"]:
            places.append(facts["output_padding"])
        pack = getattr(ops, f"conv{'_transpose' if facts['transpose'] else ''}{rank}d_prepack")
        return pack(_weight(self, "weight"), self.bias, *places, facts["dilation"], facts["groups"])


class _Embedding(Packing):
    def packed(self) -> Any:
        return torch.ops.quantized.embedding_bag_prepack(_weight(self, "weight"))


class _Cell(Packing):
    def packed(self) -> Any:
        pack, state = torch.ops.quantized.linear_prepack, self.original.__getstate__()[0]
        reduce_range = bool(state[3][0])
        own = [self.tensors()[f"bias_{end}"] for end in ("ih", "hh")]
        inner = [pack(_weight(self, f"weight_{end}"), bias) for end, bias in zip(("ih", "hh"), own, strict=True)]
        return torch.ops.quantized.make_quantized_cell_params_dynamic(*inner, *own, reduce_range)


class _Number(Packing):
    """A Python number that a static layer quantises its output with."""

    def packed(self) -> Any:
        return self.parts[0].tensor.item()


_FACTS = ("stride", "padding", "output_padding", "dilation", "groups", "transpose")
_KINDS: dict[str, type[Packing]] = {
    _LINEAR: _Linear,
    _CONV2D: _Conv,
    _CONV3D: _Conv,
    _EMBEDDING: _Embedding,
    _CELL: _Cell,
}


def packings(model: nn.Module) -> Iterator[Packing | Opaque]:
    """What torch.ao keeps outside parameters and buffers, module by module."""
    for name, module in model.named_modules():
        for attribute in _attributes(module):
            value = module.__dict__[attribute]
            if isinstance(value, torch.ScriptObject):
                yield _taken_apart(name, module, attribute, value)
            elif not isinstance(value, Unreadable):
                place = f"{name}.{attribute}".lstrip(".")
                yield _Number(name, name, place, module, attribute, [_number(attribute, value)])


@dataclass
class Opaque:
    """An object of C++ that is not taken apart.

    Attributes:
        layer: qualified name of the layer.
        name: qualified name of the attribute.
        kind: of which class it is.
        tensors: what it says it consists of.
    """

    layer: str
    name: str
    kind: str
    tensors: list[Tensor]


def set_aside(module: nn.Module) -> frozenset[str]:
    """Attributes of a module that faults are put into by setting them."""
    return frozenset(_attributes(module))


def _attributes(module: nn.Module) -> list[str]:
    """Those that hold objects of C++, and the constants of a static layer's output."""
    own = [key for key, value in vars(module).items() if isinstance(value, (torch.ScriptObject, Unreadable))]
    home = type(module).__module__
    if not home.startswith(_QUANTISED) or "quantized" not in home or ".dynamic" in home:
        return own
    numbers = {"scale": float, "zero_point": int}
    return own + [key for key, kind in numbers.items() if type(vars(module).get(key)) is kind]


def _number(attribute: str, value: float | int) -> Part:
    """A number as a checkpoint stores it: float32 if that holds it, and int64."""
    if attribute == "zero_point":
        return Part(attribute, torch.tensor(value, dtype=torch.int64), "zero_point")
    single = torch.tensor(value, dtype=torch.float32)
    exact = single if single.item() == value else torch.tensor(value, dtype=torch.float64)
    return Part(attribute, exact, "scale")


def _class_of(packed: torch.ScriptObject) -> str:
    return str(packed._type()).rpartition(".")[2]


def _taken_apart(name: str, module: nn.Module, attribute: str, value: torch.ScriptObject) -> Packing | Opaque:
    kind = _class_of(value)
    layer = name.removesuffix("_packed_params").removesuffix(".")
    place = f"{name}.{attribute}".lstrip(".")
    hidden = layer != name or attribute == "_packed_params"
    prefix = layer if hidden else f"{layer}.{attribute}".lstrip(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that such tensors are deprecated
        tensors = _opened(kind, value)
        if tensors is None:
            return Opaque(layer, place, kind, list(_inside(value)))
        parts = [part for own, tensor in tensors.items() for part in _parts(own, tensor)]
        axes = [t.q_per_channel_axis() for t in tensors.values() if t.is_quantized and not _is_whole(t)]
    return _KINDS[kind](layer, prefix, place, module, attribute, parts, max(axes, default=0))


def _opened(kind: str, value: torch.ScriptObject) -> dict[str, Tensor] | None:
    """Weights, quantised, and biases by their names; None for what is packed in another way."""
    ops = torch.ops.quantized
    try:
        if kind == _LINEAR:
            found = dict(zip(("weight", "bias"), ops.linear_unpack(value), strict=True))
        elif kind in (_CONV2D, _CONV3D):
            rank = 3 if kind == _CONV3D else 2
            turned = "_transpose" if getattr(ops, f"conv{rank}d_transpose")(value) else ""
            found = dict(zip(("weight", "bias"), getattr(ops, f"conv{turned}{rank}d_unpack")(value), strict=True))
        elif kind == _EMBEDDING:
            found = {"weight": ops.embedding_bag_unpack(value)}
        elif kind == _CELL:
            state: Any = value.__getstate__()
            name, biases, _, _, inner = state[0]
            if name != "quantized_dynamic":
                return None
            found = {f"weight_{end}": ops.linear_unpack(one)[0] for end, one in zip(("ih", "hh"), inner, strict=True)}
            found |= {f"bias_{end}": bias for end, bias in zip(("ih", "hh"), biases, strict=True)}
        else:
            return None
    except RuntimeError:  # of an engine that does not give its words away
        return None
    present = {name: tensor for name, tensor in found.items() if tensor is not None}
    words = [tensor for name, tensor in present.items() if name.startswith("weight")]
    plain = all(w.is_quantized and w.dtype in (torch.qint8, torch.quint8) for w in words)
    return present if plain else None


def _inside(value: object) -> Iterator[Tensor]:
    """The tensors that an object of C++ says it consists of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.ScriptObject):
        yield from _inside(value.__getstate__())
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _inside(part)


def _parts(name: str, tensor: Tensor) -> Iterator[Part]:
    """A quantised tensor as its words and what decodes them; any other as a copy of itself."""
    if not tensor.is_quantized:
        yield Part(name, tensor.detach().clone(), "bias")
        return
    yield Part(name, tensor.int_repr().contiguous(), "weight")
    if _is_whole(tensor):
        scale = torch.tensor(tensor.q_scale(), dtype=torch.float64)
        zero = torch.tensor(tensor.q_zero_point(), dtype=torch.int64)
    else:
        scale, zero = tensor.q_per_channel_scales().clone(), tensor.q_per_channel_zero_points().clone()
    yield Part(f"{name}.scale", scale, "scale")
    yield Part(f"{name}.zero_point", zero, "zero_point")


def _is_whole(tensor: Tensor) -> bool:
    """Whether one scale serves all of it."""
    return tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)


def _weight(packing: Packing, name: str) -> Tensor:
    """A quantised tensor with the words, scales and zero points that there are now."""
    words, scale, zero = (packing.tensors()[f"{name}{part}"] for part in ("", ".scale", ".zero_point"))
    dtype = torch.qint8 if words.dtype == torch.int8 else torch.quint8
    if scale.dim() == 0:
        made = torch._empty_affine_quantized(words.shape, scale=scale.item(), zero_point=int(zero), dtype=dtype)
    else:
        made = torch._empty_per_channel_affine_quantized(
            words.shape, scales=scale, zero_points=zero, axis=packing.axis, dtype=dtype
        )
    torch.empty(0, dtype=words.dtype).set_(made.untyped_storage(), 0, words.shape).copy_(words)  # type: ignore[call-overload]
    return made
