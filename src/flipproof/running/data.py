"""The user's data, read once and kept, so that every trial sees exactly what the golden run saw."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof._interrupts import check
from flipproof.errors import DataError, FlipproofError
from flipproof.running.values import rows_of

Data = Iterable[Any]
"""Batches `(inputs, targets)`, e.g. a DataLoader or a list."""

Output = Callable[[Any], Tensor] | str | int | None
"""How to get the tensor to judge out of what the model returns: a function, a dict key, a tuple index."""


@dataclass(frozen=True)
class Batches:
    """All batches on the model's device, and the targets of all samples on the CPU, one row a sample.

    What a row is, the task says: a class number (int64), a box, a mask.
    """

    inputs: tuple[Any, ...]
    sizes: tuple[int, ...]
    targets: Tensor

    @property
    def samples(self) -> int:
        """Number of samples in all."""
        return int(self.targets.shape[0])

    def part(self, batch: int) -> slice:
        """Which of all samples a batch holds."""
        return slice(self.borders[batch], self.borders[batch + 1])

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """The first sample of each batch, and the number of all samples."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def pairs(self) -> list[tuple[Any, Tensor]]:
        """Inputs and rows of targets, batch by batch."""
        return list(zip(self.inputs, torch.split(self.targets, list(self.sizes)), strict=True))

    def divided(self, size: int) -> Batches:
        """The same samples in their order, in batches of at most `size`.

        Raises:
            DataError: if a tensor in a larger batch does not hold one row a sample, so that it cannot be told apart.
        """
        inputs: list[Any] = []
        sizes: list[int] = []
        for i, (batch, held) in enumerate(zip(self.inputs, self.sizes, strict=True)):
            if held <= size:
                inputs.append(batch)
                sizes.append(held)
                continue
            for leaf in pytree.tree_leaves(batch):
                if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != held:
                    raise DataError(
                        f"batch {i} of {held} samples cannot be divided into batches of {size}: it holds "
                        f"{describe(leaf)}, where one row a sample is expected. Give smaller batches instead"
                    )
            for rows in torch.split(torch.arange(held), size):
                inputs.append(rows_of(batch, rows, held))
                sizes.append(int(rows.numel()))
        return Batches(tuple(inputs), tuple(sizes), self.targets)

    def digest(self) -> str:
        """A hash of every input and target, batch borders included."""
        state = blake2b(digest_size=16)
        for inputs in self.inputs:
            leaves, tree = pytree.tree_flatten(inputs)
            state.update(repr(tree).encode())
            for leaf in leaves:
                state.update(tensor_bytes(leaf) if isinstance(leaf, Tensor) else _pickled(leaf))
        state.update(tensor_bytes(self.targets))
        return state.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Type, shape and every bit of a tensor, for hashing."""
    plain = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    flat = plain.cpu().contiguous().reshape(-1)
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def _pickled(leaf: Any) -> bytes:
    """Every bit of an input that is no tensor; its repr would show only the ends of a long array."""
    try:
        return pickle.dumps(leaf, protocol=4)
    except Exception as error:  # pickling runs code of the object's own
        raise DataError(f"an input is {describe(leaf)} that cannot be pickled, so data cannot be told apart") from error


def read_batches(
    data: Data,
    device: torch.device,
    read: Callable[[Any, Any, int], Tensor] | None = None,
    join: Callable[[list[Tensor]], Tensor] = torch.cat,
) -> Batches:
    """Read and check every batch.

    Args:
        data: batches `(inputs, targets)`.
        device: where inputs go.
        read: (targets, inputs, number of the batch) → one row a sample; class numbers by default.
        join: puts the rows of all batches together.

    Raises:
        DataError: on no data, batches that are not pairs, targets that are not what the task takes.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        raise DataError(
            "data= is one (inputs, targets) pair; it takes an iterable of batches: pass [(inputs, targets)]"
        )
    if not isinstance(data, Iterable):
        raise DataError(f"data= takes an iterable of (inputs, targets) batches, got {describe(data)}")
    inputs, sizes, targets = [], [], []
    for i, batch in enumerate(data):
        check()
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"batch {i}: expected a pair (inputs, targets), got {describe(batch)}")
        given = dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
        here = pytree.tree_map(partial(_moved, device), given, is_leaf=_packed)
        target = class_targets(batch[1], i) if read is None else read(batch[1], here, i)
        if target.shape[0] == 0:
            continue
        inputs.append(here)
        sizes.append(int(target.shape[0]))
        targets.append(target)
    if not targets:
        raise DataError(
            "data= holds no samples; it takes an iterable of (inputs, targets) batches that is not exhausted"
        )
    return Batches(tuple(inputs), tuple(sizes), join(targets))


def _moved(device: torch.device, leaf: Any) -> Any:
    return leaf.to(device) if isinstance(leaf, (Tensor, PackedSequence)) else leaf  # type: ignore[arg-type]


def _packed(node: Any) -> bool:
    return isinstance(node, PackedSequence)  # its batch sizes stay on the CPU, so it has to move as a whole


def tensor_of(target: Any, batch: int, what: str) -> Tensor:
    """Targets as a tensor on the CPU.

    Raises:
        DataError: saying what they have to be.
    """
    try:
        return torch.as_tensor(target).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"batch {batch}: targets must be {what}, got {describe(target)} ({error})") from error


def class_targets(target: Any, batch: int) -> Tensor:
    """One class a sample, int64 (N,).

    Raises:
        DataError: if they are anything else.
    """
    target = tensor_of(target, batch, "class numbers")
    if target.dim() == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.dim() != 1:
        raise DataError(
            f"batch {batch}: targets must hold one class a sample, shape (samples,) or (samples, 1), "
            f"got {tuple(target.shape)}{_several(target)}"
        )
    whole: Tensor = target.to(torch.int64)
    if target.is_complex() or not bool((whole == target).all()):
        raise DataError(
            f"batch {batch}: targets must be whole class numbers, got {target.dtype} with {target[:5].tolist()} …"
        )
    return whole


def _several(target: Tensor) -> str:
    """What to do about targets that hold more than one number a sample."""
    ones = target.dim() == 2 and not target.is_complex() and bool(((target == 0) | (target == 1)).all())
    if ones and bool((target.sum(dim=1) == 1).all()):
        return "; one-hot targets go through .argmax(dim=1)"
    if ones:
        several = int((target.sum(dim=1) != 1).sum())
        return (
            f", with several or no positive labels in {several} rows; if the model gives a score for each of them, say "
            f"task=fp.MultiLabel()"
        )
    return ""


def own(inputs: Any) -> Any:
    """A copy of the inputs for one call: a model may work in place on what it is given."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model: a tuple or list is its arguments, a mapping its keyword arguments, anything else its input."""
    check()
    inputs = own(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def answered(raw: Any, output: Output) -> Tensor:
    """The tensor to judge, on the CPU: a copy, since a model may return a view of what it stores, or a buffer."""
    return pick(raw, output).detach().to("cpu", copy=True)


def take(raw: Any, output: Output) -> Any:
    """What `output` picks out of what the model returns, of whatever kind.

    Raises:
        DataError: saying what the model returned.
    """
    if output is None:
        return raw
    try:
        return output(raw) if callable(output) else raw[output]
    except FlipproofError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        said = (
            f"output= raises {type(error).__name__}: {error} on"
            if callable(output)
            else f"output={output!r} does not fit"
        )
        raise DataError(f"{said} what the model returns, {describe(raw)}{_boxes(raw)}") from error


def pick(raw: Any, output: Output) -> Tensor:
    """The tensor to judge, one row a sample.

    Raises:
        DataError: saying what the model returned and how to pick from it.
    """
    picked = take(raw, output)
    if not isinstance(picked, Tensor) or not picked.is_floating_point():
        one_each = isinstance(cast(object, picked), list)
        raise DataError(
            f"expected one floating-point tensor to judge, got {describe(picked)}; pass output= "
            + (
                "a function that makes one row of class scores a sample of it, e.g. lambda found: torch.stack([…])"
                if one_each
                else "a tuple index, a dict key or a function that picks it"
            )
            + _boxes(raw)
        )
    return picked


def _boxes(raw: Any) -> str:
    """What to add to an error where the model is a detector."""
    if not isinstance(raw, (list, tuple)) or not any(isinstance(one, Mapping) and "boxes" in one for one in raw):
        return ""
    return ". These are a detector's boxes: say task=fp.Detection()"


def describe(thing: Any) -> str:
    """What something is, for an error."""
    if isinstance(thing, Tensor):
        return f"a {thing.dtype} tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, Mapping):
        return f"a {type(thing).__name__} with the keys {list(thing)}"
    if isinstance(thing, (tuple, list)):
        more = ", …" if len(thing) > 4 else ""
        return f"a {type(thing).__name__} of {len(thing)}: " + ", ".join(describe(part) for part in thing[:4]) + more
    return f"a {type(thing).__name__}"
