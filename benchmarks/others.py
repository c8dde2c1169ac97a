"""Other fault injection tools, each used as its own documentation says, flipping a bit at a place that we choose.

Neither is a dependency: a benchmark without them says what to install.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class Missing(Exception):
    """A tool is not installed, or does not run with this torch; the message says what to do or why."""


@dataclass(frozen=True)
class Place:
    """One bit of one convolution weight: by name and flat index, and by layer number and index tuple."""

    name: str
    layer: int
    value: int
    index: tuple[int, ...]
    bit: int

    def flipped(self, weight: Tensor) -> Tensor:
        """The value there with its bit flipped, a scalar tensor."""
        mask = torch.tensor(1 << self.bit if self.bit < 31 else -(2**31), dtype=torch.int32)
        return (weight[self.index].detach().view(torch.int32) ^ mask).view(torch.float32)


def _imported(module: str, install: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # old packages fail in many ways on a new torch or numpy, not only by being absent
        raise Missing(f"{module} does not import ({type(error).__name__}: {error}); {install}") from error


class PyTorchFI:
    """pytorchfi 0.6.0: a corrupted deep copy of the model for each fault."""

    name = "pytorchfi"

    def __init__(self, net: nn.Module, image: Tensor) -> None:
        core = _imported("pytorchfi.core", "python -m pip install pytorchfi==0.6.0")
        self._image = image
        self._injector: Any = core.fault_injection(net, 1, input_shape=list(image.shape[1:]))
        self._golden = int(net(image).argmax())

    def __call__(self, place: Place) -> tuple[Tensor, int]:
        k, dim1, dim2, dim3 = place.index
        faulty = self._injector.declare_weight_fi(
            function=lambda weight, index: place.flipped(weight),
            layer_num=[place.layer],
            k=[k],
            dim1=[dim1],
            dim2=[dim2],
            dim3=[dim3],
        )
        output: Tensor = faulty(self._image)
        chosen = int(output.argmax())
        self.critical = chosen != self._golden
        self._injector.fi_reset()
        self._last = faulty  # as in a loop, where the variable holds the last model until the next is there
        return output, chosen


class TorchEI:
    """TorchEI 1.0.0: a corrupted deep copy of the state dict, loaded into the model, for each fault."""

    name = "TorchEI"

    def __init__(self, net: nn.Module, image: Tensor) -> None:
        torchei = _imported("torchei", "python -m pip install torchei==1.0.0 torchstat tqdm")
        batches = image.unsqueeze(0)  # it iterates over the first dimension
        self._outputs: list[Tensor] = []
        self._model: Any = torchei.fault_model(net, batches, infer_func=self._infer, to_cuda=False)
        self._golden = int(self._model.ground_truth)

    def _infer(self, net: nn.Module, batches: Tensor) -> Tensor:
        # its own get_result gives the class alone; this one also keeps the output, for comparison
        with torch.no_grad():
            self._outputs = [net(batch) for batch in batches]
        return torch.cat(self._outputs).argmax(dim=1)

    def __call__(self, place: Place) -> tuple[Tensor, int]:
        def flip(weights: dict[str, Tensor], rng: object) -> None:
            weights[place.name][place.index] = place.flipped(weights[place.name])

        self._model.weight_ei(flip)
        chosen = int(self._model.infer(self._model.model, self._model.valid_data))
        self.critical = chosen != self._golden
        return self._outputs[0], chosen
