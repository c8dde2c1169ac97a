"""What an analysis can be asked about: checked before anything runs, in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flipproof.errors import ConfigError, ModelError
from flipproof.formats import Format
from flipproof.spaces.sites import Neurons, Parameters


def check_asked(
    verb: str, model: object, where: object, kinds: tuple[type[Neurons | Parameters], ...], format: object
) -> None:
    """Refuse what no analysis can work on.

    Args:
        verb: the function that was called.
        model: has to be a `torch.nn.Module` that runs in Python.
        where: has to be of one of these kinds.
        kinds: of `where=`.
        format: has to be a Format, `{pattern: Format}` or None.

    Raises:
        ConfigError: saying what was expected and what came.
        ModelError: naming the module that cannot be watched.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{verb} takes a torch.nn.Module, got {_described(model)}")
    if not isinstance(where, kinds):
        expected = " or ".join(f"fp.{kind.__name__}(…)" for kind in kinds)
        raise ConfigError(f"{verb} takes where={expected}, got {_described(where)}")
    formats = list(format.values()) if isinstance(format, Mapping) else [] if format is None else [format]
    if wrong := [one for one in formats if not isinstance(one, Format)]:
        raise ConfigError(
            f"{verb} takes format= a format such as fp.Float16(), {{pattern: format}} or None, got "
            f"{_described(wrong[0])}"
        )
    scripted = next(
        (name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None
    )
    if scripted is not None:
        raise ModelError(
            f"{verb} cannot look into {scripted or 'this model'}: it is a TorchScript module, which runs without "
            f"Python; pass the torch.nn.Module that torch.jit.script or torch.jit.trace was given"
        )


def _described(thing: object) -> str:
    return f"a {type(thing).__name__}: {thing!r}" if isinstance(thing, (str, Neurons, Parameters)) else repr(thing)
