"""A first look at what every layer gives, before any neuron is hit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from flipproof.faults.neuron_sites import Neurons

_LAYERS = (_ConvNd, nn.Linear, nn.LSTM, nn.GRU)


class Observer:
    """What every layer gives, over all batches: shape, type, extremes."""

    def __init__(self, model: nn.Module, where: Neurons, left_out: dict[str, str]) -> None:
        self._model, self._left_out = model, left_out
        self.found: dict[tuple[str, int], tuple[tuple[int, ...], int, torch.dtype, Tensor, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._size = 0
        self._layers = {}
        for name, module in model.named_modules():
            if not isinstance(module, _LAYERS):
                continue
            if where.selects(name or "*"):
                self._layers[name] = module
            else:
                left_out[name] = "not selected by where="

    def watch(self, forwards: Sequence[tuple[Callable[[], object], int]]) -> None:
        """Run every batch once."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self._layers.items()]
        try:
            for forward, self._size in forwards:
                self._counts = {}
                forward()
        finally:
            for handle in handles:
                handle.remove()
        for name in self._layers:
            if (name, 0) not in self.found and name not in self._left_out:
                self._left_out[name] = "the forward never calls it as a module"
        self.found = {key: value for key, value in self.found.items() if key[0] not in self._left_out}

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            output = result[0] if isinstance(result, tuple) else result
            call = self._counts.get(name, 0)
            self._counts[name] = call + 1
            if not isinstance(output, Tensor) or isinstance(output, PackedSequence):
                self._left_out[name] = f"its output is a {type(output).__name__}"
                return
            axis = int(isinstance(module, nn.RNNBase) and not module.batch_first)
            if output.dim() <= axis or output.shape[axis] != self._size:
                self._left_out[name] = (
                    f"its output {tuple(output.shape)} does not count {self._size} samples along axis {axis}"
                )
                return
            shape = tuple(size for i, size in enumerate(output.shape) if i != axis)
            low, high = output.min(), output.max()
            before = self.found.get((name, call))
            if before is not None:
                if before[0] != shape:
                    self._left_out[name] = f"its output changes shape between batches: {before[0]}, {shape}"
                low, high = torch.minimum(low, before[3]), torch.maximum(high, before[4])
            self.found[name, call] = (shape, axis, output.dtype, low, high)

        return hook
