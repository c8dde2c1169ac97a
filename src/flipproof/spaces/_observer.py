"""A first look at what every layer and every step of a forward gives, before any neuron is hit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from flipproof._hooks import hooked
from flipproof.spaces.contract import Forwards
from flipproof.spaces.sites import LAYERS, Fold, Neurons
from flipproof.spaces.steps import Place, Steps, kind_of

T = TypeVar("T")

_MULTIPLYING = (nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class Seen(NamedTuple):
    """What is known of a value: shape of a sample's part, where samples are counted, type, extremes over batches."""

    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    low: Tensor
    high: Tensor
    fold: Fold | None


class Observer:
    """What every layer gives, over all batches: shape, axis of the samples, type, extremes.

    Which axis counts samples is not guessed from its length: the first batch runs once more with one sample added, and
    the axis that grows by one is it. One that grows by more counts samples together with tokens or heads; which of them
    lies inside is seen from the values, since the added sample is the first one again. Where the model takes no other
    size of batch, an LSTM or GRU says it by `batch_first`, a convolution by its kind; anything else has to have one
    axis of the right length besides its last.
    """

    def __init__(self, model: nn.Module, where: Neurons, left_out: dict[str, str], steps: Steps) -> None:
        self._model, self._where, self._left_out, self._steps = model, where, left_out, steps
        self.found: dict[Place, Seen] = {}
        self._counts: dict[str, int] = {}
        self._size = 0
        self._grown: list[dict[Place, tuple[int, ...]]] = []
        """Shapes with one sample more, for each way to add one that made the model answer once more."""
        self._values: list[dict[Place, Tensor]] = []
        """And the values that have no axis longer by one."""
        self._layers = {}
        kinds = {name: kind_of(module) for name, module in model.named_modules()}
        self._multiplying = {
            name: m for name, m in model.named_modules() if isinstance(m, _MULTIPLYING) or kinds[name] in LAYERS
        }
        self._bits: dict[str, int] = {}
        self._samples = 0
        self._batches: dict[Place, int] = {}
        for name, module in model.named_modules():
            if isinstance(getattr(module, "_packed_params", None), nn.Module):
                left_out[name] = "its weight is quantised and packed (torch.ao): analyse the floating-point model"
            kind = kinds[name]
            if kind in where.kinds and where.selects(name or "*"):
                self._layers[name] = module
            elif kind in LAYERS or kind in where.kinds:
                left_out[name] = "not selected by where="

    def grow(self, grown: Sequence[Callable[[], bool]], first: Callable[[], object]) -> None:
        """Run the first batch with one sample more: before `watch`, to see which axis counts samples.

        Args:
            grown: do that in several ways, and say whether the model answered once more.
            first: runs it as it is.
        """
        plain = self._shapes(first, {})[1] if grown and self._steps.wanted else {}
        for way in grown:
            answered, shapes, values = self._shapes(way, plain)
            if answered:
                self._grown.append(shapes)
                self._values.append(values)

    def watch(self, forwards: Forwards) -> None:
        """Run every batch once.

        Args:
            forwards: one function a batch that runs the model, and the samples of that batch.
        """
        with (
            hooked(self._multiplying, self._weigh),
            hooked(self._layers, self._note),
            self._steps.watched(self._note_step),
        ):
            for forward, self._size in forwards:
                self._counts = {}
                self._samples += self._size
                forward()
        for name in self._layers:
            if (name, "", 0) not in self.found and name not in self._left_out:
                self._left_out[name] = "the forward never calls it as a module"
        for place, batches in self._batches.items():
            if batches < len(forwards):
                self._left_out[name_of(place)] = f"only {batches} of {len(forwards)} batches compute it"
        if self._steps.kinds & {"gates", "cell"}:
            self._miss_gates()
        self.found = {place: value for place, value in self.found.items() if self._key(place) not in self._left_out}

    def _miss_gates(self) -> None:
        """Say which recurrent modules do not show theirs."""
        shown = {layer for layer, role, _ in self.found if role}
        for name, module in self._model.named_modules():
            asked = isinstance(module, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)) and self._where.selects(name or "*")
            if asked and name not in shown:
                self._left_out[f"{name}:gates"] = (
                    "it is not called, is in training mode, or reads a packed sequence, whose steps one kernel computes"
                )
            elif isinstance(module, (nn.RNN, nn.RNNCell)) and self._where.selects(name or "*"):
                self._left_out[f"{name}:gates"] = "a plain recurrent layer has no gates and no cell"

    @staticmethod
    def _key(place: Place) -> str:
        """Under which name something is left out: a layer with all its calls, anything else alone."""
        return name_of(place) if place[1] else place[0]

    @property
    def bits_a_sample(self) -> dict[str, int]:
        """Bits of the outputs of all modules with weights that multiply, in their own type, for one sample."""
        return {name: round(bits / max(self._samples, 1)) for name, bits in self._bits.items()}

    def _weigh(self, name: str, module: nn.Module, result: Any) -> None:
        output = result[0] if isinstance(result, tuple) and not isinstance(result, PackedSequence) else result
        output = output.data if isinstance(output, PackedSequence) else output
        if isinstance(output, Tensor):
            self._bits[name] = self._bits.get(name, 0) + 8 * output.nbytes

    def _shapes(
        self, forward: Callable[[], T], plain: Mapping[Place, tuple[int, ...]]
    ) -> tuple[T, dict[Place, tuple[int, ...]], dict[Place, Tensor]]:
        """What a run gives, the shape of what every call and every step gave, and values that grew by more than one.

        Args:
            forward: what is run.
            plain: shapes without the added sample, where values are asked for.
        """
        shapes: dict[Place, tuple[int, ...]] = {}
        values: dict[Place, Tensor] = {}
        counts: dict[str, int] = {}

        def note(name: str, module: nn.Module, result: Any) -> None:
            output = result[0] if isinstance(result, tuple) else result
            number = counts[name] = counts.get(name, -1) + 1
            if isinstance(output, Tensor):
                note_step((name, "", number), output)

        def note_step(place: Place, value: Tensor) -> None:
            shapes[place] = tuple(value.shape)
            if place in plain and _grown_axis(plain[place], shapes[place]) is None:
                values[place] = value.clone()

        with hooked(self._layers, note), self._steps.watched(note_step):
            return forward(), shapes, values

    def _axis(self, place: Place, module: nn.Module | None, value: Tensor) -> int | Fold | str:
        """Where a value counts samples, or why that cannot be said."""
        shape = tuple(value.shape)
        if self._grown:
            axes = {_grown_axis(shape, shapes.get(place, ())) for shapes in self._grown}
            if axes == {None}:
                if module is None or kind_of(module) not in LAYERS:  # layers' spaces are what they always were
                    folds = {_fold(value, values.get(place), self._size) for values in self._values}
                    fold = folds.pop()
                    if fold is not None and not folds:
                        return fold
                return f"no axis of its output {shape} counts samples: none grew by one when a sample was added"
            axis = axes.pop()
            return axis if axis is not None and not axes else f"more than one axis of its output {shape} may be samples"
        if isinstance(module, nn.RNNBase):
            return int(not module.batch_first)
        if module is None or kind_of(module) not in ("conv", "recurrent"):
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
        if (reason := self._keep((name, "", call), module, output)) is not None:
            self._left_out[name] = reason

    def _note_step(self, place: Place, value: Tensor) -> None:
        name = name_of(place)
        if not self._where.selects(place[0] or "*", name):
            self._left_out[name] = "not selected by where="
        elif not value.is_floating_point():
            self._left_out[name] = f"it is {value.dtype}"
        else:
            self._batches[place] = self._batches.get(place, 0) + 1
            if (reason := self._keep(place, None, value)) is not None:
                self._left_out[name] = reason

    def _keep(self, place: Place, module: nn.Module | None, output: Tensor) -> str | None:
        """Note one value; why it cannot be hit, if it cannot."""
        before = self.found.get(place)
        found = (before.fold or before.axis) if before is not None else self._axis(place, module, output)
        if isinstance(found, str):
            return found
        fold, axis = (found, found.samples) if isinstance(found, Fold) else (None, found)
        if fold is not None:
            if output.dim() <= fold.axis or output.shape[fold.axis] != self._size * fold.outer * fold.inner:
                return f"its output {tuple(output.shape)} does not count {self._size} samples along axis {fold.axis}"
            output = fold.opened(output)
        if output.dim() <= axis or output.shape[axis] != self._size:
            return f"its output {tuple(output.shape)} does not count {self._size} samples along axis {axis}"
        shape = tuple(size for i, size in enumerate(output.shape) if i != axis)
        low, high = output.min(), output.max()
        reason = None
        if before is not None:
            if before.shape != shape:
                reason = f"its output changes shape between batches: {before.shape}, {shape}"
            low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
        self.found[place] = Seen(shape, axis, output.dtype, low, high, fold)
        return reason


def name_of(place: Place) -> str:
    """What a value is called.

    >>> name_of(("fc", "", 0)), name_of(("blocks.0", "residual", 1))
    ('fc', 'blocks.0:residual[1]')
    """
    layer, role, call = place
    return f"{layer}{f':{role}' if role else ''}{f'[{call}]' if call else ''}"


def _grown_axis(before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The one axis that is longer by one, if everything else is as long as before."""
    if len(before) != len(after):
        return None
    longer = [axis for axis, (short, long) in enumerate(zip(before, after, strict=True)) if long != short]
    return longer[0] if len(longer) == 1 and after[longer[0]] == before[longer[0]] + 1 else None


def _fold(before: Tensor, after: Tensor | None, size: int) -> Fold | None:
    """How an axis that grew by more than one counts samples; None if values fit no order of its parts, or several.

    The added sample is the first one once more: it has to be found behind the others, which have to be where they were.
    """
    if after is None or before.dim() != after.dim() or not before.is_floating_point():
        return None
    longer = [i for i, (short, long) in enumerate(zip(before.shape, after.shape, strict=True)) if long != short]
    if len(longer) != 1:
        return None
    axis = longer[0]
    more = after.shape[axis] - before.shape[axis]
    if more < 2 or before.shape[axis] != size * more:
        return None
    fitting = []
    for inner in (i for i in range(1, more + 1) if more % i == 0):
        fold = Fold(axis, more // inner, inner)
        old, new = (fold.opened(value).movedim(fold.samples, 0) for value in (before, after))
        expected = torch.cat([old, old[:1]])
        room = 1e-5 * float(old.abs().nan_to_num(0, 0, 0).max()) if old.numel() else 0.0
        if torch.allclose(new, expected, rtol=1e-3, atol=room, equal_nan=True):
            fitting.append(fold)
    return fitting[0] if len(fitting) == 1 else None
