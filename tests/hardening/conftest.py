from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.methods.base import Hardening


@pytest.fixture
def fitted_on() -> Callable[[nn.Module, Any, Hardening], list[Any]]:
    """The batches that a method may fit to: all but the held-out part."""

    def part(model: nn.Module, data: Any, method: Hardening) -> list[Any]:
        whole = Calibration.read(model, data, torch.device("cpu"))
        batches = whole.split(method.held_out, method.seed)[0].batches
        return list(zip(batches.inputs, torch.split(batches.targets, list(batches.sizes)), strict=True))

    return part
