"""Where a model is, and where it runs."""

from __future__ import annotations

import torch
from torch import nn

from flipproof.errors import ConfigError


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are; the CPU for a model without any."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def check_device(model: nn.Module, device: object) -> torch.device:
    """Where to run: `device=`, or where the model is.

    Raises:
        ConfigError: if there is no such device here.
    """
    if device is None:
        return device_of(model)
    try:
        found: torch.device = torch.device(device)  # type: ignore[call-overload]
        if found.type != "meta":
            torch.empty(1, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device= takes a device that is here, such as 'cpu' or 'cuda:0', got {device!r}: "
            f"{str(error).strip().splitlines()[0][:200]}"
        ) from None
    return found
