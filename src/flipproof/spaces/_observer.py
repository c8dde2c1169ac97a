"""A first look at what every layer gives, before any neuron is hit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from flipproof._hooks import hooked
from flipproof.spaces.contract import Forwards
from flipproof.spaces.sites import Neurons

_LAYERS = (_ConvNd, nn.Linear, nn.LSTM, nn.GRU)
_MULTIPLYING = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class Observer:
    """What every layer gives, over all batches: shape, axis of the samples, type, extremes.

    Which axis counts samples is not guessed from its length: the first batch runs once more with one sample added, and
    the axis that grows by one is it. Where the model takes no other size of batch, an LSTM or GRU says it by
    `batch_first`, a convolution by its kind; a Linear has to have one axis of the right length besides its features.
    """

    def __init__(self, model: nn.Module, where: Neurons, left_out: dict[str, str]) -> None:
        self._model, self._left_out = model, left_out
        self.found: dict[tuple[str, int], tuple[tuple[int, ...], int, torch.dtype, Tensor, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._size = 0
        self._grown: list[dict[tuple[str, int], tuple[int, ...]]] = []
        """Shapes with one sample more, for each way to add one that made the model answer once more."""
        self._layers = {}
        self._multiplying = {name: m for name, m in model.named_modules() if isinstance(m, _MULTIPLYING)}
        self._bits: dict[str, int] = {}
        self._samples = 0
        for name, module in model.named_modules():
            if isinstance(getattr(module, "_packed_params", None), nn.Module):
                left_out[name] = "its weight is quantised and packed (torch.ao): analyse the floating-point model"
            if not isinstance(module, _LAYERS):
                continue
            if where.selects(name or "*"):
                self._layers[name] = module
            else:
                left_out[name] = "not selected by where="

    def grow(self, grown: Sequence[Callable[[], bool]]) -> None:
        """Run the first batch with one sample more: before `watch`, to see which axis counts samples.

        Args:
            grown: do that in several ways, and say whether the model answered once more.
        """
        for way in grown:
            answered, shapes = self._shapes(way)
            if answered:
                self._grown.append(shapes)

    def watch(self, forwards: Forwards) -> None:
        """Run every batch once.

        Args:
            forwards: one function a batch that runs the model, and the samples of that batch.
        """
        with hooked(self._multiplying, self._weigh), hooked(self._layers, self._note):
            for forward, self._size in forwards:
                self._counts = {}
                self._samples += self._size
                forward()
        for name in self._layers:
            if (name, 0) not in self.found and name not in self._left_out:
                self._left_out[name] = "the forward never calls it as a module"
        self.found = {key: value for key, value in self.found.items() if key[0] not in self._left_out}

    @property
    def bits_a_sample(self) -> dict[str, int]:
        """Bits of the outputs of all modules with weights that multiply, in their own type, for one sample."""
        return {name: round(bits / max(self._samples, 1)) for name, bits in self._bits.items()}

    def _weigh(self, name: str, module: nn.Module, result: Any) -> None:
        output = result[0] if isinstance(result, tuple) and not isinstance(result, PackedSequence) else result
        output = output.data if isinstance(output, PackedSequence) else output
        if isinstance(output, Tensor):
            self._bits[name] = self._bits.get(name, 0) + 8 * output.nbytes

    def _shapes(self, forward: Callable[[], bool]) -> tuple[bool, dict[tuple[str, int], tuple[int, ...]]]:
        """What a run gives, and the shape of what every call of every layer gave."""
        shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        counts: dict[str, int] = {}

        def note(name: str, module: nn.Module, result: Any) -> None:
            output = result[0] if isinstance(result, tuple) else result
            number = counts[name] = counts.get(name, -1) + 1
            if isinstance(output, Tensor):
                shapes[name, number] = tuple(output.shape)

        with hooked(self._layers, note):
            return forward(), shapes

    def _axis(self, name: str, call: int, module: nn.Module, shape: tuple[int, ...]) -> int | str:
        """Where a layer's output of this shape counts samples, or why that cannot be said."""
        if self._grown:
            axes = {_grown_axis(shape, shapes.get((name, call), ())) for shapes in self._grown}
            if axes == {None}:
                return f"no axis of its output {shape} counts samples: none grew by one when a sample was added"
            axis = axes.pop()
            return axis if axis is not None and not axes else f"more than one axis of its output {shape} may be samples"
        if isinstance(module, nn.RNNBase):
            return int(not module.batch_first)
        if isinstance(module, nn.Linear):
            fitting = [axis for axis, length in enumerate(shape[: max(1, len(shape) - 1)]) if length == self._size]
            if len(fitting) > 1:
                return (
                    f"axes {fitting} of its output {shape} are all as long as the batch, and the model takes no other "
                    f"size of batch that would tell them apart"
                )
            return fitting[0] if fitting else 0
        return 0

    def _note(self, name: str, module: nn.Module, result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        call = self._counts.get(name, 0)
        self._counts[name] = call + 1
        if not isinstance(output, Tensor) or isinstance(output, PackedSequence):
            self._left_out[name] = f"its output is a {type(output).__name__}"
            return
        before = self.found.get((name, call))
        axis = before[1] if before is not None else self._axis(name, call, module, tuple(output.shape))
        if isinstance(axis, str):
            self._left_out[name] = axis
            return
        if output.dim() <= axis or output.shape[axis] != self._size:
            self._left_out[name] = (
                f"its output {tuple(output.shape)} does not count {self._size} samples along axis {axis}"
            )
            return
        shape = tuple(size for i, size in enumerate(output.shape) if i != axis)
        low, high = output.min(), output.max()
        if before is not None:
            if before[0] != shape:
                self._left_out[name] = f"its output changes shape between batches: {before[0]}, {shape}"
            low, high = torch.minimum(low, before[3]), torch.maximum(high, before[4])
        self.found[name, call] = (shape, axis, output.dtype, low, high)


def _grown_axis(before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The one axis that is longer by one, if everything else is as long as before."""
    if len(before) != len(after):
        return None
    longer = [axis for axis, (short, long) in enumerate(zip(before, after, strict=True)) if long != short]
    return longer[0] if len(longer) == 1 and after[longer[0]] == before[longer[0]] + 1 else None
