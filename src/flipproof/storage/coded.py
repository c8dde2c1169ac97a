"""Numbers that a library's own kernels read, kept as coded words in a file and repaired when they are loaded.

`pack_` keeps words in the model's memory and decodes them at every use, which kernels that read their own layout cannot
do. So the words of quantised layers, their scales and zero points are coded where the checkpoint lies: in flash, or in
memory that is read once, at start. What happens to them there is repaired; what happens behind is not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from flipproof._tensors import same_bits
from flipproof.errors import ConfigError, FlipproofWarning, FormatError, ModelError
from flipproof.formats import Format
from flipproof.formats.packing import pack, unpack
from flipproof.spaces.tensors import Candidate, inventory
from flipproof.storage.files import read_words, write_words

_FIELD = "flipproof_coded"


def save_coded(model: nn.Module, path: str | os.PathLike[str], formats: Mapping[str, Format]) -> Path:
    """Write tensors of a model as coded words to one safetensors file, whole or not at all.

    Args:
        model: of which these tensors are; it stays as it is. Everything else in it is not written.
        path: of the file; its folder is made.
        formats: {qualified name: format}, such as ``{"fc.weight.qdata": fp.BCH(fp.Integer(8), t=2, block=60)}``. A
            format must give back the values that it was given, bit by bit: codes around a tensor's own type do.

    Raises:
        ModelError: if the model has no such tensor.
        FormatError: if a format does not give back what it was given.

    Example:
        >>> import flipproof as fp, tempfile, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = fp.save_coded(net, f"{folder}/coded.safetensors", {"weight": fp.BCH(fp.Float32(), t=2)})
        ...     again = fp.load_coded(torch.nn.Linear(4, 2), file)
        >>> torch.equal(again.weight, net.weight)
        True
    """
    state = {}
    for name, candidate in _named(model, formats, "the model").items():
        format, values = formats[name], candidate.tensor.detach()
        words = format.encode_values(values, _no_constants(name, format, values))
        if not same_bits(format.read(words, (), values.dtype)[0], values):
            raise FormatError(f"{name}: {format!r} does not give back the bits of these values; code their own type")
        state[name] = pack(words, format.layout(words.numel())).cpu()
    return write_words(path, _FIELD, formats, state)


def load_coded(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A copy of a model with the tensors that `save_coded` wrote, repaired.

    Args:
        model: of the same structure, quantised in the same way, with any values; stays untouched.
        path: of the file.

    Raises:
        ConfigError: if the file cannot be read or was not written by `save_coded`.
        ModelError: if the model is another one.

    Warns:
        FlipproofWarning: naming tensors with words beyond repair, which read as 0.
    """
    formats, state = read_words(path, _FIELD, "fp.save_coded")
    if set(formats) != set(state):
        raise ConfigError(f"{path}: the words {sorted(state)} are not those of the formats {sorted(formats)}")
    found = deepcopy(model)
    tensors = _named(found, formats, f"this {type(model).__name__}")
    beyond: list[str] = []
    for name, candidate in tensors.items():
        values, lost = _read(name, candidate.tensor, formats[name], state[name], path)
        with torch.no_grad():
            candidate.tensor.data.copy_(values)
        if lost:
            beyond.append(f"{name} ({lost:,})")
    for packing in {id(c.packing): c.packing for c in tensors.values() if c.packing is not None}.values():
        packing.settle()
    if beyond:
        warnings.warn(
            f"{path}: words beyond repair read as 0: {', '.join(beyond)}. Load another copy of the file",
            FlipproofWarning,
            stacklevel=2,
        )
    return found


def _read(
    name: str, tensor: Tensor, format: Format, stream: Tensor, path: str | os.PathLike[str]
) -> tuple[Tensor, int]:
    """The values of a stream of words, and how many are beyond repair."""
    if stream.dtype != torch.uint8 or stream.dim() != 1:
        raise ConfigError(f"{path}, {name}: expected bytes in a row, got {stream.dtype} of {tuple(stream.shape)}")
    try:
        layout = format.layout(tensor.numel())
        words = unpack(stream, layout, tuple(tensor.shape))
        values, lost = format.read(words, _no_constants(name, format, tensor), tensor.dtype)
    except (ValueError, FormatError) as error:
        raise ModelError(
            f"{path}, {name}: the model has {tuple(tensor.shape)} {tensor.dtype}, which these words are not: {error}"
        ) from None
    return values, 0 if lost is None else int(lost.sum())


def _named(model: nn.Module, formats: Mapping[str, Format], where: str) -> dict[str, Candidate]:
    """The tensors of these names.

    Raises:
        ModelError: if one is not there, or its bits cannot be reached.
    """
    known = {name: candidate for candidate in inventory(model) for name in candidate.names}
    for name in formats:
        if name not in known:
            raise ModelError(f"{where} has no tensor {name!r}; it has {', '.join(sorted(known)[:8])}, …")
        if known[name].packed is not None or known[name].problem:
            raise ModelError(f"{name}: {known[name].problem or 'packed already: save_packed writes it'}")
    return {name: known[name] for name in formats}


def _no_constants(name: str, format: Format, values: Tensor) -> tuple[Tensor, ...]:
    """() for a format that needs no constants.

    Raises:
        FormatError: if it does, which a file of words would lack.
    """
    if len(format.fit(values)):
        raise FormatError(f"{name}: {format!r} needs constants of its own, and codes here stand around a tensor's type")
    return ()
