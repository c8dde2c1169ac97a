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
        if found.type == "meta" and device_of(model).type != "meta":
            raise RuntimeError("a meta device holds no values")
        if found.type != "meta":
            torch.empty(1, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device= takes a device that is here, such as 'cpu' or 'cuda:0', got {device!r}: "
            f"{str(error).strip().splitlines()[0][:200]}"
        ) from None
    return found


class on_device:
    """The model on a device for a while; parameters go back to the very memory they came from."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._home: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        if all(t.device.type == self._device.type and self._device.index in (None, t.device.index) for t in tensors):
            return
        self._home = [(t, t.data) for t in tensors]
        try:
            self._model.to(self._device)
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *exception: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for tensor, data in self._home:
            tensor.data = data
        self._home = []


def release_memory() -> None:
    """Give what PyTorch holds in reserve back to a device that ran out of memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
