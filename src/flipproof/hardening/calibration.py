"""The calibration data of a hardening: checked, split into a part to fit on and a part to accept on, and run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof.campaigns.batches import Batches, Data, Output, call, check_labels, pick, read_batches
from flipproof.campaigns.evaluation import eval_mode, golden_run
from flipproof.errors import DataError, FlipproofWarning
from flipproof.metrics import accuracy
from flipproof.outcomes import Decision


@dataclass(frozen=True)
class Calibration:
    """Batches with what the unbounded model (the teacher) answers on them.

    Attributes:
        batches: inputs and targets.
        teacher: the unbounded model's outputs, on the CPU.
        decision: how outputs become classes.
        output: picks the tensor to judge out of what the model returns.
    """

    batches: Batches
    teacher: Tensor
    decision: Decision
    output: Output = None

    @classmethod
    def read(cls, model: nn.Module, data: Data, device: torch.device, output: Output = None) -> Calibration:
        """Read the data and run the unbounded model on it.

        Raises:
            DataError: if there is none, inputs hold NaN or ±∞, or labels do not fit the model.
            ModelError: if the model itself gives NaN or is not repeatable.
        """
        batches = read_batches(data, device)
        for i, inputs in enumerate(batches.inputs):
            for leaf in pytree.tree_leaves(inputs):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                    count = int((~torch.isfinite(leaf)).sum())
                    raise DataError(
                        f"calibration batch {i} holds {count} values that are NaN or infinite; no bound can be read "
                        f"off those. Clean the data, or leave the samples out"
                    )
        with eval_mode(model):
            teacher = golden_run(model, batches, output)
        decision = Decision.from_golden(teacher)
        check_labels(batches.targets, decision.classes)
        return cls(batches, teacher, decision, output)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.batches.samples

    @property
    def accuracy(self) -> float:
        """Of the unbounded model."""
        return accuracy(self.teacher, self.batches.targets, self.decision)

    def split(self, share: float, seed: int) -> tuple[Calibration, Calibration]:
        """A part to fit on and a held-out part to accept on, drawn at random by samples.

        Inputs that cannot be cut by sample (packed sequences, objects) are split by whole batches.

        Args:
            share: of the samples that are held out, in (0, 1).
            seed: of the draw.

        Raises:
            DataError: if one of the parts would be empty.
        """
        if len(self.batches.inputs) == 1:
            warnings.warn(
                f"the calibration data is a single batch of {self.samples} samples: bounds fitted and accepted on it "
                f"may not hold on others; pass more data",
                FlipproofWarning,
                stacklevel=2,
            )
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))
        held = max(1, round(share * self.samples))
        if self._can_be_cut():
            parts = [self.some(order[held:].sort().values), self.some(order[:held].sort().values)]
        else:
            last = max(1, round(share * len(self.batches.inputs)))
            parts = [self._whole(0, len(self.batches.inputs) - last), self._whole(-last, None)]
        if not all(part.samples for part in parts):
            raise DataError(
                f"{self.samples} calibration samples in {len(self.batches.inputs)} batches cannot be split into a part "
                f"to fit on and a held-out part; pass more data"
            )
        return parts[0], parts[1]

    def some(self, index: Tensor) -> Calibration:
        """These samples, in batches of the size of the first one; whole batches where inputs cannot be cut."""
        if not self._can_be_cut():
            wanted, first = index.numel(), 0
            while first < len(self.batches.sizes) and sum(self.batches.sizes[:first]) < wanted:
                first += 1
            return self._whole(0, first)
        whole = self._joined()
        size = self.batches.sizes[0]
        chunks = torch.split(index, size) if index.numel() else ()
        inputs = tuple(_rows(whole, chunk) for chunk in chunks)
        batches = Batches(inputs, tuple(chunk.numel() for chunk in chunks), self.batches.targets[index])
        return Calibration(batches, self.teacher[index], self.decision, self.output)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Once through in random order: inputs, targets, teacher outputs, `size` samples at a time.

        Inputs that cannot be cut by sample come in their own batches, in random order.
        """
        if self._can_be_cut():
            whole = self._joined()
            for chunk in torch.split(torch.randperm(self.samples, generator=generator), size):
                yield _rows(whole, chunk), self.batches.targets[chunk], self.teacher[chunk]
            return
        targets = torch.split(self.batches.targets, list(self.batches.sizes))
        teacher = torch.split(self.teacher, list(self.batches.sizes))
        for i in torch.randperm(len(targets), generator=generator).tolist():
            yield self.batches.inputs[i], targets[i], teacher[i]

    def outputs(self, model: nn.Module) -> Tensor:
        """What a model answers on all samples, on the CPU."""
        with eval_mode(model):
            return torch.cat([pick(call(model, x), self.output).detach().cpu() for x in self.batches.inputs])

    def accuracy_of(self, model: nn.Module) -> float:
        """Share of samples that a model gets right."""
        return accuracy(self.outputs(model), self.batches.targets, self.decision)

    def _can_be_cut(self) -> bool:
        shapes = set()
        for inputs, size in zip(self.batches.inputs, self.batches.sizes, strict=True):
            leaves, tree = pytree.tree_flatten(inputs, is_leaf=_packed)
            if not all(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size for leaf in leaves):
                return False
            shapes.add((repr(tree), tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)))
        return len(shapes) == 1

    def _joined(self) -> Any:
        return pytree.tree_map(lambda *leaves: torch.cat(leaves), *self.batches.inputs)

    def _whole(self, first: int, last: int | None) -> Calibration:
        chosen = range(len(self.batches.inputs))[first:last]
        starts = [0, *torch.tensor(self.batches.sizes).cumsum(0).tolist()]
        rows = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        sizes = tuple(self.batches.sizes[i] for i in chosen)
        batches = Batches(tuple(self.batches.inputs[i] for i in chosen), sizes, self.batches.targets[index])
        return Calibration(batches, self.teacher[index], self.decision, self.output)


def _packed(node: Any) -> bool:
    return isinstance(node, PackedSequence)


def _rows(inputs: Any, index: Tensor) -> Any:
    return pytree.tree_map(partial(_take, index), inputs)


def _take(index: Tensor, leaf: Tensor) -> Tensor:
    return leaf[index.to(leaf.device)]


def logits(outputs: Tensor, decision: Decision) -> Tensor:
    """Model outputs as logits (N, classes), whichever convention the model follows; differentiable.

    Example:
        >>> logits(torch.tensor([[0.5, 0.5]]), Decision("probabilities", 2, None)).softmax(dim=1)
        tensor([[0.5000, 0.5000]])
    """
    if decision.threshold is not None:
        single = outputs.reshape(-1)
        if decision.outputs == "probabilities":
            single = torch.logit(single, eps=torch.finfo(single.dtype).tiny)
        return torch.stack([torch.zeros_like(single), single], dim=1)
    if decision.outputs == "probabilities":
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
    return outputs


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
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
