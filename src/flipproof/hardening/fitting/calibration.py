"""The calibration data of a hardening: checked, split into a part to fit on and a part to accept on, and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof.errors import DataError
from flipproof.running.data import Batches, Data, Output, answered, call, pick
from flipproof.running.device import device_of
from flipproof.running.evaluation import eval_mode, golden_run, is_infrastructure, one_thread
from flipproof.running.judge import Judge
from flipproof.running.snapshots import Snapshot
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.recognise import read
from flipproof.running.tasks.settled import Settled


@dataclass(frozen=True)
class Calibration:
    """Batches with what the unbounded model (the teacher) answers on them.

    Attributes:
        batches: inputs and targets.
        teacher: the unbounded model's outputs, on the CPU.
        judge: of answers.
        output: makes one row a sample of what the model returns.
        cut: for each input tensor, the dimension that counts samples; None if samples cannot be taken apart.
    """

    batches: Batches
    teacher: Tensor
    judge: Judge
    output: Output = None
    cut: tuple[int, ...] | None = None

    @classmethod
    def read(
        cls,
        model: nn.Module,
        data: Data,
        device: torch.device,
        output: Output = None,
        task: Task | None = None,
    ) -> Calibration:
        """Read the data and run the unbounded model on it; what its forwards write is put back.

        Raises:
            DataError: if there is none, inputs hold NaN or ±∞, or labels do not fit the model.
            ModelError: if the model itself gives NaN or is not repeatable.
        """
        with eval_mode(model):
            batches, known, reading = read(model, data, device, task, output)
        for i, inputs in enumerate(batches.inputs):
            for leaf in pytree.tree_leaves(inputs):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                    count = int((~torch.isfinite(leaf)).sum())
                    raise DataError(
                        f"calibration batch {i} holds {count} values that are NaN or infinite; no bound can be read "
                        f"off those. Clean the data, or leave the samples out"
                    )
        with eval_mode(model):
            state = Snapshot(model)
            try:
                teacher = golden_run(model, batches, reading, state)
                judge = known.judge(model, batches, reading, teacher)
                judge.check_targets(batches.targets)
                cut = _samples_lie_in(model, batches, teacher, reading)
            finally:
                state.restore()
        return cls(batches, teacher, judge, reading, cut)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.batches.samples

    @property
    def task(self) -> Task:
        """For verbs that are called on these targets and with this `output`."""
        return Settled(self.judge)

    @property
    def accuracy(self) -> float:
        """The task's main metric, from 0 to 1, of the unbounded model: of a classification its accuracy."""
        return self.accuracy_from(self.teacher)

    def split(self, share: float, seed: int) -> tuple[Calibration, Calibration]:
        """A part to fit on and a held-out part to accept on, drawn at random by samples.

        Inputs that cannot be cut by sample (packed sequences, objects) are split by whole batches, drawn at random.

        Args:
            share: of the samples that are held out, in (0, 1).
            seed: of the draw.

        Raises:
            DataError: if one of the parts would be empty.
        """
        units = self.samples if self.cut is not None else len(self.batches.inputs)
        order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
        held = max(1, round(share * units))
        if held >= units:
            why = "" if self.cut is not None else ", whose samples cannot be taken apart,"
            raise DataError(
                f"{self.samples} calibration samples in {len(self.batches.inputs)} batches{why} cannot be split into a "
                f"part to fit on and a held-out part; pass more data"
            )
        return self._units(order[held:]), self._units(order[:held])

    def folds(self, count: int, seed: int) -> list[Calibration]:
        """At most `count` parts of about equal size, drawn at random by samples, or by batches as `split` does it."""
        units = self.samples if self.cut is not None else len(self.batches.inputs)
        order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
        return [self._units(part) for part in torch.tensor_split(order, min(count, units))]

    def some(self, index: Tensor, size: int | None = None) -> Calibration:
        """These samples, in batches of `size` (of the first one's by default); whole batches if they cannot be cut."""
        if self.cut is None:
            wanted, first = index.numel(), 0
            while first < len(self.batches.sizes) and sum(self.batches.sizes[:first]) < wanted:
                first += 1
            return self._whole(list(range(first)))
        whole = self._joined()
        size = self.batches.sizes[0] if size is None else size
        chunks = torch.split(index, size) if index.numel() else ()
        inputs = tuple(_rows(whole, chunk, self.cut) for chunk in chunks)
        batches = Batches(inputs, tuple(chunk.numel() for chunk in chunks), self.batches.targets[index])
        return Calibration(batches, self.teacher[index], self.judge, self.output, self.cut)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor | None, Any, Tensor, Tensor]]:
        """Once through in random order: sample numbers, inputs, targets, teacher outputs, `size` samples at a time.

        Inputs that cannot be cut by sample come in their own batches, in random order, without sample numbers.
        """
        units = self.samples if self.cut is not None else len(self.batches.inputs)
        yield from self._in_order(torch.randperm(units, generator=generator), size)

    def ordered(self, size: int) -> Iterator[tuple[Tensor | None, Any, Tensor, Tensor]]:
        """As `shuffled`, in their own order."""
        units = self.samples if self.cut is not None else len(self.batches.inputs)
        yield from self._in_order(torch.arange(units), size)

    def _in_order(self, order: Tensor, size: int) -> Iterator[tuple[Tensor | None, Any, Tensor, Tensor]]:
        if self.cut is not None:
            whole = self._joined()
            for chunk in torch.split(order, size):
                yield chunk, _rows(whole, chunk, self.cut), self.batches.targets[chunk], self.teacher[chunk]
            return
        targets = torch.split(self.batches.targets, list(self.batches.sizes))
        teacher = torch.split(self.teacher, list(self.batches.sizes))
        for i in order.tolist():
            yield None, self.batches.inputs[i], targets[i], teacher[i]

    def outputs(self, model: nn.Module) -> Tensor:
        """What a model answers on all samples, on the CPU."""
        with eval_mode(model):
            return torch.cat([answered(call(model, x), self.output) for x in self.batches.inputs])

    def answers_of(self, model: nn.Module) -> Tensor:
        """The same, bit by bit repeatable, the model as it was: what a copy elsewhere has to answer on these batches.

        `teacher` may differ from it in last bits, where samples came out of other batches.
        """
        with eval_mode(model), one_thread(device_of(model)):
            return golden_run(model, self.batches, self.output)

    def accuracy_of(self, model: nn.Module) -> float:
        """The task's main metric of a model."""
        return self.accuracy_from(self.outputs(model))

    def accuracy_from(self, outputs: Tensor) -> float:
        """The task's main metric of a model that answers this."""
        return float(self.judge.quality(outputs, self.batches.targets, self.teacher).mean())

    def _units(self, index: Tensor) -> Calibration:
        """Samples, or batches where samples cannot be taken apart, in their own order."""
        index = index.sort().values
        return self.some(index) if self.cut is not None else self._whole(index.tolist())

    def _joined(self) -> Any:
        assert self.cut is not None
        trees = [pytree.tree_flatten(inputs) for inputs in self.batches.inputs]
        leaves = [
            torch.cat(same, dim=d) for d, same in zip(self.cut, zip(*(t[0] for t in trees), strict=True), strict=True)
        ]
        return pytree.tree_unflatten(leaves, trees[0][1])

    def _whole(self, chosen: list[int]) -> Calibration:
        starts = [0, *torch.tensor(self.batches.sizes).cumsum(0).tolist()]
        rows = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        sizes = tuple(self.batches.sizes[i] for i in chosen)
        batches = Batches(tuple(self.batches.inputs[i] for i in chosen), sizes, self.batches.targets[index])
        return Calibration(batches, self.teacher[index], self.judge, self.output, self.cut)


def _samples_lie_in(model: nn.Module, batches: Batches, teacher: Tensor, output: Output) -> tuple[int, ...] | None:
    """The dimension of each input tensor that counts samples: the first, or the second of sequence-first inputs.

    Shapes alone cannot say so where a batch has as many steps as samples: two samples are cut out and run, and must be
    answered as they were in their batch.
    """
    choices: list[list[int]] = []
    layouts = set()
    for inputs, size in zip(batches.inputs, batches.sizes, strict=True):
        leaves, tree = pytree.tree_flatten(inputs, is_leaf=_packed)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in leaves):
            return None
        here = [[d for d in (0, 1) if d < leaf.dim() and leaf.shape[d] == size] for leaf in leaves]
        choices = here if not choices else [[d for d in a if d in b] for a, b in zip(choices, here, strict=False)]
        layouts.add((repr(tree), tuple((leaf.dim(), leaf.dtype) for leaf in leaves)))
    if len(layouts) != 1:
        return None
    shapes = [[tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs)] for inputs in batches.inputs]
    index = torch.tensor(sorted({batches.sizes[0] - 1, 0}, reverse=True))
    expected = teacher[index].double()
    # rounding in another batch size, and far less than what tells samples apart
    largest = float(teacher.abs().max())
    spread = float((teacher.double().amax(0) - teacher.double().amin(0)).max())
    room = 1e-3 * spread + 1e3 * torch.finfo(torch.float32).eps * largest
    if teacher.dtype in (torch.float16, torch.bfloat16):
        room += 8 * torch.finfo(teacher.dtype).eps * largest
    for cut in islice(product(*choices), _LAYOUTS):
        kept = {tuple((*s[:d], *s[d + 1 :]) for s, d in zip(batch, cut, strict=True)) for batch in shapes}
        if len(kept) != 1:
            continue
        try:
            given = pick(call(model, _rows(batches.inputs[0], index, cut)), output).detach().double().cpu()
        except Exception as error:  # a model may refuse what is cut the wrong way
            if is_infrastructure(error):
                raise
            continue
        if given.shape == expected.shape and bool(((given - expected).abs() <= room).all()):
            return cut
    return None


_LAYOUTS = 16
"""So many ways of cutting several input tensors are tried."""


def _packed(node: Any) -> bool:
    return isinstance(node, PackedSequence)


def _rows(inputs: Any, index: Tensor, cut: tuple[int, ...]) -> Any:
    leaves, tree = pytree.tree_flatten(inputs)
    return pytree.tree_unflatten(
        [leaf.index_select(d, index.to(leaf.device)) for leaf, d in zip(leaves, cut, strict=True)], tree
    )


DistillationLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, targets, teacher's logits) → a scalar."""


def cross_entropy(given: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross entropy to the targets; the teacher has no say."""
    return F.cross_entropy(given, targets)


def distillation(given: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(student ‖ teacher) of the softened outputs, mean over samples (ProAct, Eq. 7).

    Eq. (7) has the student first, which is the reverse of what distillation usually takes.
    """
    student = F.log_softmax(given / temperature, dim=1)
    target = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(target, student, reduction="batchmean", log_target=True)
