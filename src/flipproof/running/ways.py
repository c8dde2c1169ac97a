"""The ways in which a model is run where it is deployed: one sample at a time, exported by torch, in onnxruntime."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flipproof._interrupts import check, gives_back
from flipproof.errors import ConfigError, DataError, FlipproofError, ModelError
from flipproof.formats.base import bit_pattern
from flipproof.running.data import Batches, Data, Output, answered, call, own, pick, read_batches
from flipproof.running.decision import DecisionChoice
from flipproof.running.deployment import Deployment, Way
from flipproof.running.device import device_of
from flipproof.running.evaluation import eval_mode, golden_run
from flipproof.running.judge import Judge
from flipproof.running.snapshots import Snapshot
from flipproof.running.tasks.base import Rows, Task, unlabelled
from flipproof.running.tasks.classification import task_of
from flipproof.running.tasks.recognise import read

SAMPLES = 8
"""So many samples are run each way."""

SPACINGS = 1e3
"""Differences up to so many spacings of floating-point numbers at the largest output are put down to rounding."""

FACTOR = 10.0
"""So much more may a model's answers differ than those of the plain model do between the same two ways."""

OPERATIONS = 2_000
"""What `harden`, `protect` and `pack_` export has at most so many operations: ResNet-50 has 180. Tracing so many takes
some ten seconds."""

_NO_OPERATIONS = ("__get__", "empty_strided", "detach", "detach.default")
"""What tracing itself asks of every tensor of a model."""

DEPLOYMENT = "_flipproof_deployment"
"""Attribute of a model that holds what was found when it was made."""


@gives_back
def check_deployment(
    model: nn.Module,
    data: Data | None = None,
    *,
    plain: nn.Module | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    samples: int = SAMPLES,
) -> Deployment:
    """Does a model answer alike one sample at a time, exported by `torch.export`, and as ONNX in onnxruntime?

    Sums are taken in another order in another batch size and another runtime, so that equal bits are not to be
    expected. What is asked is that differences are those of rounding and that no decision changes. A difference is put
    down to rounding up to 1,000 · ε · max|output|, ε the spacing of the outputs' type at 1 (2^−23 for float32), or up
    to ten times as much as the `plain` model differs between the same two ways, if that is more: bounds or words must
    not make of rounding what it was not before.

    - *batch 1 against N*: each sample alone, against all together.
    - *torch.export*: the exported program, whose batch size is left open, against the model, at two batch sizes.
    - *onnxruntime*: that program as ONNX, on the CPU, against the model, at two batch sizes. It takes onnx, onnxscript
      and onnxruntime: ``pip install flipproof[onnx]``.

    What is exported gives the one tensor that `output` picks. The model is in eval mode meanwhile and is given back as
    it was. Exporting takes from a tenth of a second to minutes, ONNX several times as long. `harden`, `protect` and
    `pack_` leave out of it what has more than 2,000 operations, such as packed words with a decoder of long codes; here
    there is no such limit.

    Args:
        model: any module that gives one row of outputs a sample.
        data: batches `(inputs, targets)`, of which the first one's first samples are run. Without data, what was found
            when `harden`, `protect` or `pack_` (with `check=`) made this model.
        plain: the model as it was before it was hardened or packed.
        output: picks the tensor to compare, as for `assess`.
        task: what the model is for, and so what another decision is, as for `assess`.
        decision: how outputs become classes, as for `assess`.
        samples: how many are run, 2 at least.

    Raises:
        ConfigError: for fewer samples, or without data on a model of which nothing is known.
        DataError: if there are no data or they do not fit the model.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> found = fp.check_deployment(net, [(torch.randn(16, 4), torch.zeros(16))])
        >>> found.agrees, [way.name for way in found.ways]
        (True, ['batch 1 against N', 'torch.export', 'onnxruntime'])
    """
    if data is None:
        found = vars(model).get(DEPLOYMENT)
        if not isinstance(found, Deployment):
            raise ConfigError(
                f"check_deployment takes data to run this {type(model).__name__} on: nothing was found out about it yet"
            )
        return found
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ConfigError(f"check_deployment takes samples= a whole number from 2, got {samples!r}")
    return Few.of(model, data, samples, output, task_of(task, decision)).compared(model, plain)


@dataclass(frozen=True)
class Few:
    """A few samples, and what is critical in answers to them.

    Attributes:
        inputs: a batch of `samples` or more.
        axes: for each leaf of `inputs`, the dimension that counts samples, None for none; None where samples cannot be
            taken apart.
        samples: how many are run.
        output: makes one row a sample of what a model returns, as the task reads it.
        targets: of these samples.
        judge: of answers; None where nothing says what they are for.
    """

    inputs: Any
    axes: Sequence[int | None] | None
    samples: int
    output: Output
    targets: Tensor
    judge: Judge | None

    @classmethod
    def of(cls, model: nn.Module, data: Data, samples: int, output: Output, task: Task | None) -> Few:
        """The first samples of a user's data, which the model has to take.

        Raises:
            DataError: if there are none, or they do not fit.
        """
        known: Task | None = task
        with eval_mode(model):
            state = Snapshot(model)
            try:
                lazy = isinstance(data, Iterable) and not isinstance(data, tuple)
                first = list(islice(data, 1)) if lazy else data
                try:
                    batches, known, reading = read(model, first, device_of(model), task, output)
                except DataError:
                    if task is not None:
                        raise
                    # targets that nothing is known of: answers are compared all the same
                    batches, reading = read_batches(first, device_of(model), unlabelled), output
                rows = golden_run(model, batches, reading, state)
                judge = (
                    None if known is None else _judge_of(known, model, batches, reading, rows, asked=task is not None)
                )
            finally:
                state.restore()
        inputs, count = batches.inputs[0], min(samples, len(rows))
        return cls(inputs, _axes(inputs, len(rows)), count, reading, batches.targets[:count], judge)

    @property
    def picks(self) -> Output:
        """What picks the tensor to compare out of what a model returns."""
        return self.output.output if isinstance(self.output, Rows) else self.output

    def changed(self, found: Tensor, known: Tensor) -> Tensor | None:
        """Which of so many first samples are answered otherwise, bool; None where nothing says what answers are."""
        if self.judge is None:
            return None
        pair = (known, found)
        if isinstance(self.output, Rows):
            pair = (self.output.rows(known), self.output.rows(found))
        return self.judge.critical(*pair, self.targets[: len(known)])

    def compared(
        self,
        model: nn.Module,
        plain: nn.Module | None,
        *,
        operations: float = math.inf,
        decoded: nn.Module | None = None,
    ) -> Deployment:
        """As `check_deployment`.

        Args:
            model: to be run.
            plain: as it was before.
            operations: that a forward may have for it to be exported.
            decoded: what is exported in its place, if packed words do not travel: the same with plain parameters.
        """
        return Deployment(tuple(self._ways(model, plain, operations, decoded)), self.samples)

    def _ways(
        self, model: nn.Module, plain: nn.Module | None, operations: float, decoded: nn.Module | None
    ) -> Iterator[Way]:
        names = ["batch 1 against N", "torch.export", "onnxruntime"]
        if decoded is not None:
            names[1:] = [f"{name}, decoded" for name in names[1:]]
        if self.axes is None or self.samples < 2:
            alone = "there is one sample alone"
            why = "the samples of a batch cannot be taken apart" if self.axes is None else alone
            yield from (Way(name, "refused", reason=why) for name in names)
            return
        mine = _Ways(model, self, self.axes, operations, decoded)
        other = None if plain is None else cache(partial(_Ways, plain, self, self.axes, operations, None))
        for name in names:
            began = time.perf_counter()
            way = _judged(name, mine, other, self.changed)
            yield replace(way, seconds=time.perf_counter() - began)


Pairs = list[tuple[Tensor, Tensor]]
"""(What was answered this way, what the model itself answers), for batches that begin with the same samples."""


class _NotInstalled(Exception):
    """What runs the model this way is not there; it says what."""


class _Ways:
    """One model, run the ways that it is deployed. What a forward or an export writes is put back."""

    def __init__(
        self,
        model: nn.Module,
        few: Few,
        axes: Sequence[int | None],
        operations: float,
        decoded: nn.Module | None,
    ) -> None:
        self.model, self.inputs, self.axes, self.output = model, few.inputs, axes, few.picks
        self.samples, self.operations = few.samples, operations
        self.exported = model if decoded is None else decoded
        self.sizes = (few.samples, max(few.samples // 2, 1))
        self.failed = False
        self.state = Snapshot(model)

    def pairs(self, name: str) -> Pairs:
        """By the name of a way."""
        if name == "batch 1 against N":
            return [(torch.cat([self._answers([i]) for i in range(self.samples)]), self.whole[0])]
        if name.startswith("torch.export"):
            run = self.program.module()
            return [(self._run(run, size), expected) for size, expected in zip(self.sizes, self.whole, strict=True)]
        return [(found, expected) for found, expected in zip(self._onnx(), self.whole, strict=True)]

    @cached_property
    def whole(self) -> list[Tensor]:
        """The model's own answers, in each batch size."""
        return [self._answers(range(size)) for size in self.sizes]

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The model as a program whose batch size is open."""
        self.failed = True
        arguments, named = _arguments(self._rows(range(self.samples)))
        batch, several = torch.export.Dim("batch"), isinstance(self.inputs, (tuple, list))
        leaves, tree = pytree.tree_flatten(self.inputs)
        shapes = pytree.tree_unflatten(
            [({axis: batch} if axis is not None else None) for axis, _ in zip(self.axes, leaves, strict=True)], tree
        )
        with _Quietly(self.exported), _Limited(self.operations):
            program = torch.export.export(
                _Picked(self.exported, self.output),
                arguments,
                named,
                dynamic_shapes={"named": shapes} if named else {"given": tuple(shapes) if several else (shapes,)},
            )
        self.failed = False
        return program

    def _onnx(self) -> list[Tensor]:
        """What onnxruntime answers, in each batch size."""
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise _NotInstalled(f"pip install {' '.join(missing)}")
        if self.failed:
            raise ModelError("there is no exported program to make a graph of")
        import onnxruntime

        with _Quietly(self.exported):
            # without its optimiser, which folds packed words into the floats that they stand for
            graph = torch.onnx.export(self.program, dynamo=True, verbose=False, optimize=False)
            assert graph is not None
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(
                graph.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        names = [each.name for each in session.get_inputs()]
        found = []
        for size in self.sizes:
            leaves = pytree.tree_leaves(self._rows(range(size)))
            if len(names) != len(leaves):
                raise ModelError(f"its graph takes {len(names)} inputs, the model {len(leaves)}")
            given = {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}
            found.append(torch.from_numpy(session.run(None, given)[0]))
        return found

    def _answers(self, rows: Sequence[int]) -> Tensor:
        with eval_mode(self.model):
            try:
                return answered(call(self.model, self._rows(rows)), self.output)
            finally:
                self.state.restore()

    def _run(self, program: nn.Module, size: int) -> Tensor:
        check()
        arguments, named = _arguments(own(self._rows(range(size))))
        with torch.no_grad():
            found: Tensor = program(*arguments, **named)
        return found.detach().to("cpu", copy=True)

    def _rows(self, rows: Sequence[int]) -> Any:
        leaves, tree = pytree.tree_flatten(self.inputs)
        index = torch.tensor(list(rows))
        return pytree.tree_unflatten(
            [
                leaf if axis is None else leaf.index_select(axis, index.to(leaf.device))
                for leaf, axis in zip(leaves, self.axes, strict=True)
            ],
            tree,
        )


class _Quietly:
    """While a model is traced: in eval mode, without what the exporter says beside; then all is put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._state = model, Snapshot(model)

    def __enter__(self) -> None:
        check()
        self._random = torch.get_rng_state()
        self._logged = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._eval = eval_mode(self._model)
        self._eval.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._eval.__exit__(None, None, None)
        self._warnings.__exit__(*exception)
        logging.disable(self._logged)
        self._state.restore()  # a forward that keeps what it computes has kept a tensor of the tracer's
        torch.set_rng_state(self._random)


class _Limited(TorchFunctionMode):
    """Stops what has more operations than it may: tracing takes time for each."""

    def __init__(self, operations: float) -> None:
        super().__init__()
        self._left = self._most = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._left -= isinstance(result, Tensor) and getattr(func, "__name__", "") not in _NO_OPERATIONS
        if self._left < 0:
            raise ModelError(
                f"a forward has more than {self._most:,} operations, to trace which may take minutes; "
                f"fp.check_deployment(model, data) does so, and fp.unpack_ decodes packed words"
            )
        return result


class _Picked(nn.Module):
    """A model that gives the one tensor to compare."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.train(model.training)

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return pick(self.model(*given, **named), self.output)


def _judged(
    name: str,
    mine: _Ways,
    plain: Callable[[], _Ways] | None,
    differ: Callable[[Tensor, Tensor], Tensor | None],
) -> Way:
    """One way: run and compared; where it differs by more than rounding, beside what the plain model differs by."""
    try:
        pairs = mine.pairs(name)
    except _NotInstalled as what:
        return Way(name, "not installed", reason=str(what))
    except Exception as error:  # exporters raise whatever they like on what they cannot take
        return Way(name, "refused", reason=_reason(error))
    if other := [(found, known) for found, known in pairs if found.shape != known.shape]:
        shapes = [tuple(tensor.shape) for tensor in other[0]]
        return Way(name, "refused", reason=f"it answers in the shape {shapes[0]}, the model in {shapes[1]}")
    changed: int | None = 0
    others = torch.zeros(mine.samples, dtype=torch.bool)
    for found, known in pairs:
        here = differ(found, known)
        if here is not None:
            others[: len(known)] |= here
        changed = None if here is None else int(others.sum())
    difference = max(_difference(*pair) for pair in pairs)
    room = max(_room(known) for _, known in pairs)
    if all(torch.equal(bit_pattern(found), bit_pattern(known)) for found, known in pairs):
        return Way(name, "bit-equal", difference, room, changed)
    if difference > room and plain is not None:
        try:
            room = max(room, FACTOR * max(_difference(*pair) for pair in plain().pairs(name)))
        except Exception as error:  # as above: then there is nothing to compare with
            reason = f"the plain model cannot be run this way ({_reason(error)})"
            return Way(name, "beyond rounding", difference, room, changed, reason)
    return Way(name, "within rounding" if difference <= room else "beyond rounding", difference, room, changed)


def _difference(found: Tensor, known: Tensor) -> float:
    """The largest |found − known|: 0 for two NaN or equal infinities, infinite where only one is such."""
    a, b = found.double(), known.double()
    gap = torch.where((a == b) | (torch.isnan(a) & torch.isnan(b)), 0.0, (a - b).abs())
    return float(torch.where(torch.isnan(gap), math.inf, gap).max()) if gap.numel() else 0.0


def _room(known: Tensor) -> float:
    largest = known.double().abs().nan_to_num(nan=0.0, posinf=0.0)
    return SPACINGS * torch.finfo(known.dtype).eps * (float(largest.max()) if largest.numel() else 0.0)


def _reason(error: Exception) -> str:
    """What an exporter said, in a line: its errors go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:3])
    return said if isinstance(error, FlipproofError) else f"{type(error).__name__}: {said[:300]}"


def _judge_of(
    task: Task, model: nn.Module, batches: Batches, reading: Output, rows: Tensor, *, asked: bool
) -> Judge | None:
    """How answers are judged; None if nobody said what they are for and they do not fit what targets look like."""
    try:
        return task.judge(model, batches, reading, rows)
    except DataError:
        if asked:
            raise
        return None


def _axes(inputs: Any, samples: int) -> list[int | None] | None:
    """Which dimension of each leaf counts samples: the first where it is as long as the outputs; None for no leaf."""
    leaves = pytree.tree_leaves(inputs, is_leaf=lambda node: isinstance(node, PackedSequence))
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        return None
    axes = [0 if isinstance(x, Tensor) and x.dim() and x.shape[0] == samples else None for x in leaves]
    return axes if any(axis is not None for axis in axes) else None


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `call` passes them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
