"""Trained weights from a file, whatever wrote it, without unpickling."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from flipproof.errors import ConfigError


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from safetensors, or from a PyTorch file without unpickling objects.

    A dict that holds `state_dict` is opened, and the prefix `module.` that DataParallel leaves is dropped.

    Args:
        model: changed in place.
        path: ends in .safetensors, or is what `torch.save` wrote.

    Raises:
        ConfigError: if the file cannot be read safely or does not fit the model.
    """
    if Path(path).is_file() and tarfile.is_tarfile(path):
        raise ConfigError(
            f"{path} is a tar archive, which PyTorch wrote before 0.4; reading it can run code (CVE-2025-32434): "
            f"load it where you trust it, and save its state dict again"
        )
    try:
        if str(path).endswith(".safetensors"):
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise whatever the bytes provoke; none of it is executed
        raise ConfigError(f"cannot read weights from {path}: {type(error).__name__}: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(state).__name__}, not a state dict")
    try:
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except RuntimeError as error:
        raise ConfigError(f"the weights in {path} do not fit {type(model).__name__}: {error}") from error
