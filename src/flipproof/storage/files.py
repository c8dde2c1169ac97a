"""A packed model as a file: safetensors, its formats as text in the metadata. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from flipproof._fields import Fields, read_json
from flipproof._files import replacing
from flipproof._tensors import load_state
from flipproof.errors import ConfigError, ModelError
from flipproof.formats import Format, parse_format
from flipproof.formats.packing import Packed
from flipproof.spaces.quantised import is_wrapper
from flipproof.storage.pack import pack_

VERSION = 1
"""Of the file: counts up whenever what is written changes. A file of another version is refused."""

_FIELD = "flipproof_packed"


def packed_formats(model: nn.Module) -> dict[str, Format]:
    """Qualified name → format of each parameter that `pack_` packed.

    >>> import flipproof as fp
    >>> packed_formats(fp.pack_(nn.Linear(4, 2), fp.Affine(bits=5)))
    {'weight': Affine(bits=5, axis=None)}
    """
    found: dict[str, Format] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList) and len(module) == 1 and isinstance(module[0], Packed):
            owner, _, attribute = name.rpartition(".")
            found[f"{owner.removesuffix('parametrizations').rstrip('.')}.{attribute}".lstrip(".")] = module[0].format
    return found


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a packed model's words and whatever else it stores to one safetensors file, whole or not at all.

    Args:
        model: what `pack_` made.
        path: of the file; its folder is made.

    Raises:
        ModelError: if nothing in the model is packed.

    Example:
        >>> import flipproof as fp, tempfile, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> words = fp.pack_(torch.nn.Linear(4, 2), fp.BCH(fp.Affine(bits=5), t=3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = fp.load_packed(net, fp.save_packed(words, f"{folder}/words.safetensors"))
        >>> torch.equal(again.weight, words.weight)
        True
    """
    formats = packed_formats(model)
    if not formats:
        raise ModelError(
            f"no parameter of this {type(model).__name__} is packed; make one with fp.pack_(model, format)"
        )
    stored = model.state_dict()
    if other := [name for name, value in stored.items() if not isinstance(value, Tensor) or is_wrapper(value)]:
        raise ModelError(
            f"{other[0]} of this model's state_dict is a {type(stored[other[0]]).__name__}; files hold plain tensors. "
            f"Numbers that a library has quantised are written by fp.save_coded"
        )
    state = {name: value.detach().cpu().contiguous().clone() for name, value in stored.items()}
    return write_words(path, _FIELD, formats, state)


def write_words(
    path: str | os.PathLike[str], field: str, formats: Mapping[str, Format], state: dict[str, Tensor]
) -> Path:
    """Tensors as a safetensors file, whole or not at all; a field of the metadata has the formats of their words."""
    about = {"version": VERSION, "formats": {name: repr(format) for name, format in formats.items()}}
    with replacing(path) as temporary:
        save_file(state, temporary, {field: json.dumps(about)})
    return Path(path)


def read_words(path: str | os.PathLike[str], field: str, writer: str) -> tuple[dict[str, Format], dict[str, Tensor]]:
    """What `write_words` wrote: formats, and tensors.

    Args:
        path: of the file.
        field: of the metadata.
        writer: the verb that writes such files, for errors.

    Raises:
        ConfigError: if the file cannot be read, or another verb or version wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(field)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as a file of {writer}: {error}") from None
    if text is None:
        raise ConfigError(f"{path} was not written by {writer}: its metadata has no {field}")
    about = Fields(read_json(text, str(path)), str(path))
    if (version := about.whole("version")) != VERSION:
        raise ConfigError(f"{path} is of version {version} of this file; this flipproof reads version {VERSION}")
    named = about.inside("formats")
    formats = {name: parse_format(named.text(name)) for name in about.mapping("formats")}
    about.end()
    return formats, state


def load_packed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The packed copy that `save_packed` wrote, rebuilt around a model of the same structure.

    The words come from the file; `model` gives the code, and stays untouched. The file is read as numbers and texts,
    each checked; formats are those that flipproof exports.

    Args:
        model: the network as it was before `pack_`, with any weights.
        path: of the file.

    Raises:
        ConfigError: if the file cannot be read or was not written by `save_packed`.
        ModelError: if the model is another one.
    """
    formats, state = read_words(path, _FIELD, "fp.save_packed")
    ours = dict(model.named_parameters())
    if missing := sorted(set(formats) - set(ours)):
        raise ModelError(f"{path} holds {missing[0]}, which this {type(model).__name__} has not")
    fresh = deepcopy(model)
    with torch.no_grad():
        for name in formats:  # whatever was there: a format may have no word for it
            fresh.get_parameter(name).zero_()
    packed = pack_(fresh, formats)
    expected = packed.state_dict()
    for name in sorted(set(expected) | set(state)):
        there, here = state.get(name), expected.get(name)
        if there is None or here is None:
            raise ModelError(
                f"{name} is {'not in ' + str(path) if there is None else 'in the file, but not in the model'}"
            )
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise ModelError(
                f"{name}: the model has {tuple(here.shape)} {here.dtype}, {path} has {tuple(there.shape)} {there.dtype}"
            )
    load_state(packed, state)
    return packed
