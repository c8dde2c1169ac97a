"""What a model stores, tensor by tensor: under which name and kind, in which format, and what cannot be hit."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats import BFloat16, Float8E4M3, Float8E5M2, Float16, Float32, Float64, Format, Integer
from flipproof.formats.integer import INTEGERS
from flipproof.formats.packing import Packed
from flipproof.spaces.onnx_model import Initialisers
from flipproof.spaces.packed_params import Opaque, Packing, packings
from flipproof.spaces.quantised import attached, holds_words, is_words, is_wrapper, keeps_parts, parts, role_of

FormatChoice = Format | Mapping[str, Format] | None
"""One format, `{pattern: format}` (the first match wins), or None. What it does not store keeps its own type."""

Kind = Literal["weight", "bias", "norm", "buffer", "other", "scale", "zero_point"]
KINDS: tuple[Kind, ...] = ("weight", "bias", "norm", "buffer", "other", "scale", "zero_point")

_PARAMETRISED = re.compile(r"(^|\.)parametrizations\.([^.]+)\..*$")
"""What computes a parameter, which the rest of a model reads under its own name."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NATIVE: dict[torch.dtype, Format] = {
    torch.float64: Float64(),
    torch.float32: Float32(),
    torch.float16: Float16(),
    torch.bfloat16: BFloat16(),
    torch.float8_e4m3fn: Float8E4M3(),
    torch.float8_e5m2: Float8E5M2(),
    **{dtype: Integer.of(dtype) for dtype in INTEGERS},
}
"""The format that a tensor of each type is in by itself."""


@dataclass(frozen=True)
class Candidate:
    """One thing that a model stores, counted once however many names it has."""

    names: tuple[str, ...]
    owner: str
    kind: Kind
    tensor: Tensor
    bits: int
    """What it takes in the model's memory, in its own type; memory that it shares with one before it is not its own."""
    packed: Packed | None = None
    """What decodes it, if `tensor` holds packed words."""
    constants: tuple[Tensor, ...] = ()
    """What it decodes them with, in the order that it takes."""
    problem: str = ""
    """Why its bits cannot be hit, if they cannot."""
    unread: bool = False
    """Not part of what inference stores: a counter, or constants that are taken to lie in protected memory."""
    held: str = ""
    """The parameter, buffer or attribute that it is a part of; "" where it is one itself."""
    packing: Packing | None = None
    """How the model comes to use it, if it is our own copy of what an object of C++ holds."""

    @property
    def name(self) -> str:
        """The first qualified name, as `named_parameters` gives it."""
        return self.names[0]

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, not a parameter."""
        return self.kind == "buffer"

    @property
    def refused(self) -> bool:
        """Whether it has to be excluded by name: a parameter whose bits cannot be hit."""
        return bool(self.problem) and not self.is_buffer and not self.unread and self.tensor.numel() > 0

    @property
    def quantisable(self) -> bool:
        """Whether a format that quantises, given alone, stores it: the weight of a layer, of whatever class that is.

        A weight is a floating-point parameter that one of its modules calls so, with two dimensions or more. One that
        is quantised already is not quantised again.
        """
        own = self.tensor
        return self.kind == "weight" and not self.held and own.is_floating_point() and own.dim() >= 2

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """True if a pattern fits one of its names, or a module that holds it.

        ``"fc"`` fits ``fc.weight``, ``"layer1.*"`` fits ``layer1.0.conv1.weight``; ``*`` also crosses dots.
        """
        return matches(self.names, patterns)


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a glob pattern fits one of these qualified names, or a module that holds it.

    >>> matches(["fc.weight"], ["fc"]), matches(["layer1.0.conv1"], ["layer1.*"]), matches(["fc.bias"], ["*.weight"])
    (True, True, False)
    """
    held_by = {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts) + 1)}
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in held_by)


def inventory(model: nn.Module) -> list[Candidate]:
    """Everything that a model stores: its parameters and what torch.ao packed, then its buffers, module by module.

    Raises:
        FaultSpaceError: if this is no eager `torch.nn.Module`, or holds tensors without bits.
    """
    check_model(model)
    memory = _Memory()
    found = [*_tensors(model, memory), *_taken_apart(model, memory)]
    return sorted(found, key=_order(model))


def elsewhere(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What a model stores outside parameters and buffers: in objects of C++, and in what hangs on quantised weights."""
    found: list[tuple[str, Tensor]] = []
    for packing in packings(model):
        if isinstance(packing, Opaque):
            found += [(f"{packing.name}.{i}", tensor) for i, tensor in enumerate(packing.tensors)]
        else:
            found += [(f"{packing.prefix}.{part.name}", part.tensor) for part in packing.parts]
    return found + [(one.name, one.tensor) for one in _listing(model)[0] if one.source == "attribute"]


def check_hit(hit: Sequence[Candidate]) -> None:
    """Raise FaultSpaceError where a bit of one chosen tensor would be a bit of another, or a parameter has no bits."""
    problems = [f"{c.name}: {c.problem}" for c in hit if c.refused]
    if problems:
        names = ", ".join(repr(c.name) for c in hit if c.refused)
        raise FaultSpaceError(
            "these parameters cannot be hit:\n  " + "\n  ".join(problems) + f"\nor leave them out of the fault space "
            f"with where=fp.Parameters(exclude=[{names}]); they then count as stored bits that are not hit"
        )
    spans = sorted(
        (str(c.tensor.device), c.tensor.data_ptr(), c.tensor.data_ptr() + c.tensor.nbytes, c.name) for c in hit
    )
    for (device, _, end, first), (other_device, start, _, second) in pairwise(spans):
        if device == other_device and start < end:
            first, second = sorted((first, second))
            raise FaultSpaceError(
                f"{first} and {second} overlap in memory without being the same tensor: a bit of one would be a bit of "
                f"both. Exclude one of them, or give it memory of its own."
            )


def check_model(model: object) -> None:
    """Raise FaultSpaceError unless this is an eager `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise FaultSpaceError(f"a fault space is made of a torch.nn.Module, got {kind}{program_hint(model)}")
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise FaultSpaceError(
            f"{f'{scripted} of this model' if scripted else 'this model'} is a TorchScript module, whose compiled code "
            f"may hold copies of its weights; pass the eager module that was given to torch.jit.script or trace"
        )
    compiled = next((name for name, m in model.named_modules() if _is_compiled(m)), None)
    if compiled is not None and _is_freezing():
        raise FaultSpaceError(
            f"{f'{compiled} of this model' if compiled else 'this model'} is compiled with torch._inductor.config."
            f"freezing, whose code holds copies of the weights; pass the module that was given to torch.compile"
        )


def program_hint(model: object) -> str:
    """What to do with a program of torch.export, which is no module; "" for anything else."""
    return "; pass its .module()" if type(model).__name__ == "ExportedProgram" else ""


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _is_freezing() -> bool:
    inductor = sys.modules.get("torch._inductor.config")
    return bool(getattr(inductor, "freezing", False))


@dataclass(frozen=True)
class _Named:
    """A tensor under one of its names.

    Attributes:
        name: qualified.
        held: the parameter, buffer or attribute that it is, or is a part of.
        tensor: itself.
        source: where it is registered.
    """

    name: str
    held: str
    tensor: Tensor
    source: Literal["parameter", "buffer", "attribute"]


def _tensors(model: nn.Module, memory: _Memory) -> list[Candidate]:
    """Parameters and buffers, non-persistent ones too; tensors over the same memory are one."""
    registered = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if empty := [f"{name}: {problem}" for name, t in registered if (problem := _without_bits(t))]:
        raise FaultSpaceError("these tensors hold no bits yet:\n  " + "\n  ".join(empty))
    listing, quantised = _listing(model)
    unread = _unread(model, [one.held for one in listing])
    named: dict[object, list[_Named]] = {}
    for one in listing:
        if one.tensor.numel():
            named.setdefault(_place(one.tensor), []).append(one)
    never = "a graph was traced of the model, and no step of it reads this"
    found = []
    for together in named.values():
        candidate = _describe(model, together, memory, quantised)
        if all(one.held in unread for one in together):
            candidate = replace(candidate, problem=never, unread=True)
        found.append(candidate)
    return found


def _unread(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Tensors that a traced module keeps and that none of its steps reads, such as what PT2E quantised."""
    unread: set[str] = set()
    for place, module in _graphs(model):
        prefix = f"{place}." if place else ""
        used = [node for node in module.graph.nodes if node.users or node.op == "call_module"]
        steps = [(node.op, prefix + str(node.target)) for node in used]
        read = {target for op, target in steps if op == "get_attr"}
        called = tuple(f"{target}." for op, target in steps if op in ("call_module", "get_attr"))
        inside = {name: _PARAMETRISED.sub(r"\1\2", name) for name in names if name.startswith(prefix)}
        unread |= {name for name, seen in inside.items() if seen not in read and not seen.startswith(called)}
    return unread


def _graphs(model: nn.Module, place: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """Traced modules that are only ever called: the model itself, or one inside what does nothing but call it."""
    if isinstance(model, fx.GraphModule):
        yield place, model
    elif type(model) in (nn.Sequential, nn.DataParallel) or type(model).__name__ == "OptimizedModule":
        for name, child in model.named_children():
            yield from _graphs(child, f"{place}.{name}".lstrip("."))


def _listing(model: nn.Module) -> tuple[list[_Named], frozenset[str] | None]:
    """Every tensor of a model under every name, wrappers taken apart; and which layers hold words.

    None for a model of which no layer is quantised.
    """
    listing: list[_Named] = []
    layers: dict[str, None] = {}
    for source in ("parameter", "buffer"):
        named = model.named_parameters if source == "parameter" else model.named_buffers
        for held, tensor in named(remove_duplicate=False):
            apart = parts(held, tensor) if keeps_parts(tensor) else [(held, tensor)]
            listing += [_Named(name, held, part, source) for name, part in apart]
            quantised = holds_words(held, tensor) if source == "parameter" else is_words(held, tensor)
            if quantised and tensor.numel():
                layers[held.rpartition(".")[0]] = None
    for layer in layers:
        for own, tensor in attached(model.get_submodule(layer)):
            name = f"{layer}.{own}".lstrip(".")
            held = f"{layer}.{own.partition('.')[0]}".lstrip(".")
            listing.append(_Named(name, held, tensor, "attribute"))
    modules = [*model.modules()]
    packed = any(isinstance(module, Packed) and module.dtype in INTEGERS for module in modules)
    packed |= any(isinstance(value, torch.ScriptObject) for module in modules for value in vars(module).values())
    return listing, frozenset(layers) if layers or packed else None


def _without_bits(tensor: Tensor) -> str | None:
    if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
        return "is not initialised yet; run the model once on a batch"
    if tensor.is_meta:
        return "is on the meta device and holds no bits; load the weights first"
    return None


def _place(tensor: Tensor) -> object:
    """What two names of one piece of memory have in common."""
    if not _is_plain(tensor):
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and _is_one(tensor)


def _is_one(tensor: Tensor) -> bool:
    """Whether it is one tensor with memory of its own, and no wrapper around others."""
    if is_wrapper(tensor):
        return False
    try:
        return tensor.layout != torch.strided or tensor.data_ptr() >= 0
    except RuntimeError:  # a subclass that only poses as a tensor
        return False


def _describe(model: nn.Module, named: list[_Named], memory: _Memory, quantised: frozenset[str] | None) -> Candidate:
    first = named[0]
    tensor = first.tensor
    owner_name, attribute, owner = _owner(model, first.held)
    own = tuple(dict.fromkeys(one.name for one in named))
    if isinstance(owner, ParametrizationList):  # of words that `pack_` packed: `_owner` goes up from any other
        place = model.get_submodule(owner_name)
        decoder = cast(Packed, owner[0])
        full = f"{owner_name}.{attribute}".lstrip(".")
        if first.held.endswith(".original0"):
            kind = _kind_of_parameter(attribute, place, quantised is not None)
            bits = decoder.format.stored_bits(decoder.shape)
            rest = tuple(constant for label, constant in owner.named_buffers() if label != "original0")
            return Candidate((full,), owner_name, kind, tensor, bits, decoder, rest)
        why = f"constants of {decoder.format!r}, which are taken to lie in protected memory"
        return Candidate(own, owner_name, "buffer", tensor, memory.fresh(tensor), problem=why, unread=True)
    if first.source == "buffer" and attribute == "num_batches_tracked" and not tensor.is_floating_point():
        why = "a counter that inference never reads"
        return Candidate(own, owner_name, "buffer", tensor, memory.fresh(tensor), problem=why, unread=True)
    problem = _unsupported(tensor)
    kinds = [_kind_of(model, one, None if problem else quantised) for one in named]
    # an embedding that is tied to a Linear layer is that layer's weight too, whatever its own module calls it
    kind = kinds[0] if kinds[0] == "buffer" or "weight" not in kinds else "weight"
    held = "" if first.name == first.held and first.source == "parameter" else first.held
    return Candidate(own, owner_name, kind, tensor, memory.fresh(tensor), problem=problem, held=held)


def _kind_of(model: nn.Module, one: _Named, quantised: frozenset[str] | None) -> Kind:
    layer, attribute, owner = _owner(model, one.held)
    if one.source == "parameter" and one.name == one.held:
        return _kind_of_parameter(attribute, owner, quantised is not None)
    if one.source == "buffer" and (quantised is None or isinstance(owner, (*_NORMS, Initialisers))):
        return "buffer"
    if (role := role_of(one.name)) is not None:
        return role
    if one.source == "buffer" and one.name == one.held:
        if is_words(one.name, one.tensor):
            return "weight"
        return "bias" if quantised is not None and layer in quantised and "bias" in attribute else "buffer"
    if one.source == "attribute" and one.name != one.held:
        return "weight" if is_words(one.name, one.tensor) else "other"
    return _kind(attribute, owner)


def _kind_of_parameter(attribute: str, owner: nn.Module, quantised: bool) -> Kind:
    if isinstance(owner, Initialisers):  # the graph says it
        return cast(Kind, owner.kinds[attribute])
    role = role_of(attribute) if quantised and not isinstance(owner, _NORMS) else None
    return _kind(attribute, owner) if role is None else role


def _kind(attribute: str, owner: nn.Module) -> Kind:
    if isinstance(owner, _NORMS):
        return "norm"
    if "bias" in attribute:
        return "bias"
    return "weight" if "weight" in attribute else "other"


def _owner(model: nn.Module, name: str) -> tuple[str, str, nn.Module]:
    """The module a tensor belongs to: its name, the tensor's name in it, and itself (packed words: their decoder)."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, ParametrizationList):  # layer.parametrizations.weight.original belongs to layer
        attribute = owner_name.rpartition(".")[2]
        owner_name = owner_name.removesuffix(f"parametrizations.{attribute}").rstrip(".")
        if not (len(owner) == 1 and isinstance(owner[0], Packed)):
            owner = model.get_submodule(owner_name)
    return owner_name, attribute, owner


def _unsupported(tensor: Tensor) -> str:
    """Why the bits of this tensor cannot be hit, and what to do; "" if they can."""
    if not _is_one(tensor):
        return (
            f"is a {type(tensor).__name__}, which makes its words anew whenever they are read, so none can be hit; "
            f"assess the floating-point model with format=fp.Affine(8), or one that fp.pack_ packed"
        )
    if tensor.layout != torch.strided:
        return f"is {tensor.layout}; call .to_dense()"
    if tensor.is_quantized:
        return f"is {tensor.dtype}; assess the floating-point model with format=fp.Affine(8)"
    if tensor.dtype not in _NATIVE:
        return f"is {tensor.dtype}, which has no Format"
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if reach != tensor.numel():
        return (
            f"is a view whose elements do not fill their memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}), so that its bits belong to another tensor; make it contiguous"
        )
    return ""


def _taken_apart(model: nn.Module, memory: _Memory) -> Iterable[Candidate]:
    """What torch.ao keeps outside parameters and buffers."""
    for found in packings(model):
        if isinstance(found, Opaque):
            why = (
                f"packed by torch.ao as {found.kind}, which does not give its words away; assess the floating-point "
                f"model with format=fp.Affine(8), or one that fp.pack_ packed"
            )
            bits = sum(memory.fresh(tensor) for tensor in found.tensors)
            yield Candidate((found.name,), found.layer, "weight", torch.empty(0), bits, problem=why)
            continue
        for part in found.parts:
            name, kind, bits = f"{found.prefix}.{part.name}".lstrip("."), cast(Kind, part.kind), 8 * part.tensor.nbytes
            yield Candidate((name,), found.layer, kind, part.tensor, bits, held=found.place, packing=found)


class _Memory:
    """Which bytes of the model's memory were counted already."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], list[tuple[int, int]]] = {}

    def fresh(self, tensor: Tensor) -> int:
        """Bits of this tensor that no tensor before it had."""
        if is_wrapper(tensor):
            return sum(self.fresh(part) for _, part in parts("", tensor))
        if not _is_plain(tensor) or tensor.is_quantized:
            stored = tensor._nnz() if tensor.layout == torch.sparse_coo else tensor.numel()
            return 8 * stored * tensor.element_size()
        start = tensor.data_ptr()
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans = [(start, start + reach * tensor.element_size())]
        seen = self._seen.setdefault((str(tensor.device), tensor.untyped_storage().data_ptr()), [])
        for first, last in seen:
            spans = [part for a, b in spans for part in ((a, min(b, first)), (max(a, last), b)) if part[0] < part[1]]
        seen += spans
        return 8 * min(sum(b - a for a, b in spans), tensor.nbytes)


def _order(model: nn.Module) -> Callable[[Candidate], tuple[int, int, int]]:
    """Parameters before buffers, modules in their order; in each module as it was before `pack_` packed some."""
    modules = dict(model.named_modules(remove_duplicate=False))
    numbers = {name: i for i, name in enumerate(modules)}

    def key(candidate: Candidate) -> tuple[int, int, int]:
        module = modules[candidate.owner]
        own = list(getattr(module, "_stored_order", module._parameters))
        attribute = candidate.name.removeprefix(f"{candidate.owner}.").partition(".")[0]
        place = own.index(attribute) if attribute in own else len(own)
        return int(candidate.is_buffer), numbers[candidate.owner], place

    return key


def check_format(choice: object) -> None:
    """Raise FormatError unless this is a FormatChoice."""
    ways = "a Format such as fp.Float32(), a mapping {pattern: Format}, or None for each tensor's own type"
    if isinstance(choice, Mapping):
        for pattern, format in choice.items():
            if not isinstance(pattern, str) or not isinstance(format, Format):
                raise FormatError(f"format= maps patterns (text) to Formats, got {pattern!r}: {format!r}")
    elif isinstance(choice, type) and issubclass(choice, Format):
        raise FormatError(f"format= takes {ways}, got the class {choice.__name__}; write fp.{choice.__name__}()")
    elif choice is not None and not isinstance(choice, Format):
        hint = f"; write fp.{choice}()" if isinstance(choice, str) and choice.isidentifier() else ""
        raise FormatError(f"format= takes {ways}, got {choice!r}{hint}")


def asked_format(candidate: Candidate, choice: FormatChoice) -> Format | None:
    """The format that was asked for, for one tensor; None where it keeps its own type.

    One format alone that quantises stores the weights of layers, any other one every floating-point tensor; a mapping
    means what it says, the tensor's own name first, then patterns in their order. What a format does not store keeps
    its own type: integers are stored by `Integer`, and codes around it.
    """
    if choice is None:
        return None
    packed, dtype = candidate.packed is not None, candidate.tensor.dtype
    if isinstance(choice, Format):
        wanted = packed or candidate.quantisable or not choice.weights_only
        return choice if wanted and (packed or choice.stores(dtype)) else None
    named = [choice[name] for name in candidate.names if name in choice]  # before patterns, and names of what holds it
    fitting = chain(named, (chosen for pattern, chosen in choice.items() if candidate.matches((pattern,))))
    return next((chosen for chosen in fitting if packed or chosen.stores(dtype)), None)


def choose_format(candidate: Candidate, choice: FormatChoice) -> Format:
    """The format in which one tensor is hit: what was asked for, or else its own type.

    Raises:
        FaultSpaceError: if it is packed in another format, or float64 and no format was asked for at all.
    """
    asked = asked_format(candidate, choice)
    if candidate.packed is None:
        dtype = candidate.tensor.dtype
        if (
            choice is None and dtype == torch.float64 and candidate.packing is None
        ):  # hardly what it will be deployed in: the user has to say so
            raise FaultSpaceError(
                f"{candidate.name} is {dtype}: pass format= to say how it is stored, e.g. fp.Float32(), or "
                f"fp.formats.Float64() if all 64 bits are"
            )
        return own_format(dtype) if asked is None else asked
    if asked not in (None, candidate.packed.format):
        raise FaultSpaceError(
            f"{candidate.name} is stored as {candidate.packed.format!r} in memory; format= cannot store it differently"
        )
    return candidate.packed.format


def own_format(dtype: torch.dtype) -> Format:
    """The format that a tensor of this type is in by itself."""
    return _NATIVE[dtype]


def unmatched(found: Sequence[Candidate], choice: FormatChoice) -> dict[str, str]:
    """Patterns of a mapping that store nothing of this model, with the reason: misspelt, or of a format for others."""
    if not isinstance(choice, Mapping):
        return {}
    reasons = {}
    for pattern, chosen in choice.items():
        fitting = [candidate for candidate in found if candidate.matches((pattern,))]
        if not fitting:
            reasons[pattern] = "fits nothing that this model stores"
        elif not any(one.packed is not None or chosen.stores(one.tensor.dtype) for one in fitting):
            types = sorted({str(one.tensor.dtype) for one in fitting})
            reasons[pattern] = f"fits only tensors of {', '.join(types)}, which {chosen!r} does not store"
    return reasons
