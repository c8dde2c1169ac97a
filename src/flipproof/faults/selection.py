"""Which tensors of a model belong to a fault space, under which name and kind, in which format."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from flipproof.errors import FaultSpaceError
from flipproof.formats import BFloat16, Float16, Float32, Format
from flipproof.formats.packing import Packed

FormatChoice = Format | Mapping[str, Format] | None
"""One format for all, `{pattern: format}` (the first match wins), or None: each tensor in its own float type."""

Kind = Literal["weight", "bias", "norm", "buffer", "other"]
KINDS: tuple[Kind, ...] = ("weight", "bias", "norm", "buffer", "other")

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_QUANTISED_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_NATIVE: dict[torch.dtype, Format] = {
    torch.float32: Float32(),
    torch.float16: Float16(),
    torch.bfloat16: BFloat16(),
}


@dataclass(frozen=True)
class Candidate:
    """One tensor of a model that could be hit, counted once however many names it has."""

    names: tuple[str, ...]
    owner: str
    kind: Kind
    quantisable: bool
    tensor: Tensor
    packed: Packed | None = None
    """What decodes it, if `tensor` holds packed words."""

    @property
    def name(self) -> str:
        """The first qualified name, as `named_parameters` gives it."""
        return self.names[0]

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """True if a pattern fits one of its names, or a module that holds it.

        ``"fc"`` fits ``fc.weight``, ``"layer1.*"`` fits ``layer1.0.conv1.weight``; ``*`` also crosses dots.
        """
        reachable = {
            ".".join(parts[:n]) for parts in (name.split(".") for name in self.names) for n in range(1, len(parts) + 1)
        }
        return any(fnmatch.fnmatchcase(name, pattern) for name in reachable for pattern in patterns)


def candidates(model: nn.Module, *, buffers: bool) -> list[Candidate]:
    """Every parameter of the model, and on request every floating-point buffer, in the model's own order.

    Raises:
        FaultSpaceError: naming every tensor whose bits cannot be hit and what to do about it.
    """
    packed = _packed(model)
    named: dict[int, tuple[Tensor, list[tuple[str, bool]]]] = {}
    problems: list[str] = []
    listing: list[tuple[str, Tensor, bool]] = [
        (name, tensor, False) for name, tensor in model.named_parameters(remove_duplicate=False)
    ]
    if buffers:
        listing += [
            (name, tensor, True)
            for name, tensor in model.named_buffers(remove_duplicate=False)
            if tensor.is_floating_point()  # counters such as num_batches_tracked decide nothing in eval mode
        ]
    for name, tensor, is_buffer in listing:
        if problem := _unsupported(tensor):
            problems.append(f"{name}: {problem}")
        elif tensor.numel():
            named.setdefault(id(tensor), (tensor, []))[1].append((name, is_buffer))
    if problems:
        raise FaultSpaceError(
            "these tensors cannot be stored in a fault space:\n  "
            + "\n  ".join(problems)
            + "\nLeave them out with fp.Parameters(exclude=[…]) only after the model no longer holds them as "
            "parameters, or assess the floating-point model."
        )
    found = _merge_shared(model, list(named.values()))
    return sorted([*found, *packed], key=_order(model)) if packed else found


def _packed(model: nn.Module) -> list[Candidate]:
    """Parameters that `store_` packed, under the names they had."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList) and len(module) == 1 and isinstance(module[0], Packed):
            owner, _, attribute = name.rpartition(".parametrizations.")
            if not owner and name.startswith("parametrizations."):
                owner, attribute = "", name.removeprefix("parametrizations.")
            place = model.get_submodule(owner)
            kind = _kind(attribute, place, is_buffer=False)
            quantisable = kind == "weight" and isinstance(place, _QUANTISED_LAYERS)
            full = f"{owner}.{attribute}".lstrip(".")
            words = module.original0
            assert isinstance(words, Tensor)
            found.append(Candidate((full,), owner, kind, quantisable, words, module[0]))
    return found


def _order(model: nn.Module) -> Callable[[Candidate], tuple[int, int]]:
    """Where a tensor stood before some were packed: modules in their order, packed parameters first in each."""
    modules = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return lambda candidate: (modules[candidate.owner], 0 if candidate.packed is not None else 1)


def _unsupported(tensor: Tensor) -> str | None:
    if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
        return "is not initialised yet; run the model once on a batch"
    if tensor.is_meta:
        return "is on the meta device and holds no bits; load the weights first"
    if tensor.layout != torch.strided:
        return f"is {tensor.layout}; call .to_dense()"
    if tensor.is_quantized or not tensor.is_floating_point():
        return f"is {tensor.dtype}; only floating-point parameters have a Format (yet)"
    return None


def _merge_shared(model: nn.Module, found: list[tuple[Tensor, list[tuple[str, bool]]]]) -> list[Candidate]:
    """One candidate a piece of memory: tensors over the same storage are one, partial overlaps are refused."""
    by_memory: dict[tuple[object, ...], list[tuple[str, bool]]] = {}
    tensors: dict[tuple[object, ...], Tensor] = {}
    for tensor, names in found:
        memory: tuple[object, ...] = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
        )
        by_memory.setdefault(memory, []).extend(names)
        tensors.setdefault(memory, tensor)
    spans = []
    for memory, tensor in tensors.items():
        name = by_memory[memory][0][0]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if reach != tensor.numel():
            raise FaultSpaceError(
                f"{name} is a view whose elements do not fill their memory (shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}): its bits belong to another tensor. Make it contiguous or exclude it."
            )
        spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), name))
    spans.sort()
    for (device, _, end, first), (other_device, start, _, second) in pairwise(spans):
        if device == other_device and start < end:
            first, second = sorted((first, second))
            raise FaultSpaceError(
                f"{first} and {second} overlap in memory without being the same tensor: a bit of one would be a bit of "
                f"both. Exclude one of them, or give it memory of its own."
            )
    return [_describe(model, tensors[memory], names) for memory, names in by_memory.items()]


def _describe(model: nn.Module, tensor: Tensor, names: list[tuple[str, bool]]) -> Candidate:
    places = [_owner(model, name) for name, _ in names]
    owner_name, attribute, owner = places[0]
    kind = _kind(attribute, owner, is_buffer=names[0][1])
    # an embedding that is tied to a Linear layer is that layer's weight too
    quantisable = kind == "weight" and any(isinstance(owner, _QUANTISED_LAYERS) for _, _, owner in places)
    return Candidate(tuple(name for name, _ in names), owner_name, kind, quantisable, tensor)


def _kind(attribute: str, owner: nn.Module, *, is_buffer: bool) -> Kind:
    if is_buffer:
        return "buffer"
    if isinstance(owner, _NORMS):
        return "norm"
    if "bias" in attribute:
        return "bias"
    return "weight" if "weight" in attribute else "other"


def _owner(model: nn.Module, name: str) -> tuple[str, str, nn.Module]:
    """The module a tensor belongs to: its name, the tensor's name in it, and itself."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, ParametrizationList):  # layer.parametrizations.weight.original belongs to layer
        attribute = owner_name.rpartition(".")[2]
        owner_name = owner_name.removesuffix(f"parametrizations.{attribute}").rstrip(".")
        owner = model.get_submodule(owner_name)
    return owner_name, attribute, owner


def choose_format(candidate: Candidate, choice: FormatChoice) -> Format | str:
    """The format of one tensor, or in words why it is not stored."""
    if candidate.packed is not None:
        if choice is None:
            return candidate.packed.format
        raise FaultSpaceError(
            f"{candidate.name} is stored as {candidate.packed.format!r} in memory; format= cannot store it differently"
        )
    if choice is None:
        native = _NATIVE.get(candidate.tensor.dtype)
        if native is None:
            raise FaultSpaceError(
                f"{candidate.name} is {candidate.tensor.dtype}, which has no format of its own; "
                f"pass format=, e.g. fp.Float32(), to say how it is stored"
            )
        return native
    if isinstance(choice, Format):
        if choice.weights_only and not candidate.quantisable:
            return f"{choice!r} stores only weights of Conv, Linear and recurrent layers"
        return choice
    for pattern, chosen in choice.items():
        if candidate.matches((pattern,)):
            return chosen
    return "no pattern of format= fits it"
