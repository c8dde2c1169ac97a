"""Running a model over all batches: the golden run once, then the same again under faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from flipproof._hooks import hooked
from flipproof._interrupts import check
from flipproof.errors import ConfigError, DataError, FlipproofError, InfrastructureError, ModelError
from flipproof.formats.base import bit_pattern
from flipproof.running.data import Batches, Output, answered, call, describe, pick
from flipproof.running.snapshots import RandomState, Snapshot
from flipproof.spaces.contract import WordOutcomes


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; every module's own training flag is put back afterwards.

    Raises:
        ConfigError: inside `torch.nn.utils.parametrize.cached()`, where parameters are not computed anew.
    """
    if getattr(parametrize, "_cache_enabled", 0):  # torch does not say so otherwise
        raise ConfigError(
            "flipproof was called inside torch.nn.utils.parametrize.cached(), where a model goes on computing with the "
            "values that its parameters had before: faults in what they are computed from would show nowhere. Leave "
            "the with block first"
        )
    training = [module for module in model.modules() if module.training]
    if training:  # every trial comes by here, and nearly always finds the campaign's own eval mode
        _evaluate(model)
    try:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors would not count in-place changes
            yield
    finally:
        for module in training:
            module.training = True


def _evaluate(model: nn.Module) -> None:
    """`model.eval()`, where what torch.export made keeps the mode that it was exported in and refuses to be asked."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    refusing = [(vars(module), dict(vars(module))) for module in graphs]
    for attributes, _ in refusing:
        attributes.pop("train", None)
        attributes.pop("eval", None)
    try:
        model.eval()
    finally:
        for attributes, before in refusing:
            now = {**attributes}
            attributes.clear()
            attributes.update({key: now.get(key, value) for key, value in before.items()})


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one torch thread: sums are then taken in one order, so that every executor gets the same bits."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FaultyRunError(Exception):
    """The model raised while it was faulty."""


@dataclass(frozen=True)
class Answers:
    """What a faulty model answered.

    Attributes:
        outputs: of all samples, on the CPU; None if the model raised.
        flips: bits that changed.
        error: what it raised.
        words: how the stored words that were hit were read; None where no words are hit.
    """

    outputs: Tensor | None
    flips: int
    error: str | None = None
    words: WordOutcomes | None = None


def run_faulty(
    batches: int,
    answer: Callable[[int], Tensor],
    corrupted: Callable[[], AbstractContextManager[int]],
    state: Snapshot,
    randomness: RandomState,
    *,
    kept: bool = True,
) -> Answers:
    """Run every batch with faults in place, each on the model as it was before the first.

    What a forward writes is put back before the next batch. The faults are taken out for that and injected again, since
    it may have written over them.

    Args:
        batches: how many.
        answer: runs one batch, by its number.
        corrupted: injects the faults for as long as it is entered.
        state: of the fault-free model.
        randomness: pinned before every batch.
        kept: False for a model that is thrown away afterwards: after the last batch, bits are not compared.
    """
    outputs: list[Tensor] = []
    flips = 0
    clean = True  # seen to be: asking costs as much as a small layer, so it is asked once a forward
    try:
        while len(outputs) < batches:
            with corrupted() as flips:
                while len(outputs) < batches and clean:
                    randomness.pin()
                    clean = False
                    outputs.append(answer(len(outputs)))
                    clean = not state.changed(bits=kept or len(outputs) < batches)
            if not clean:
                state.restore()
                clean = True
    except FaultyRunError as failure:
        return Answers(None, flips, str(failure)[:500])
    finally:
        if not clean and state.changed(bits=kept):  # what it holds may be others' too, such as attributes of its class
            state.restore()
    return Answers(torch.cat(outputs), flips)


def answer(forward: Callable[[], Any], output: Output, batch: int) -> Tensor:
    """What a faulty model gives on one batch, on the CPU.

    Raises:
        FaultyRunError: if the model, or `output` on what it returns, raises on its own account.
        InfrastructureError: if memory ran out or the device failed.
    """
    check()
    try:
        return answered(forward(), output)
    except Exception as error:
        if is_infrastructure(error):
            raise InfrastructureError(f"batch {batch}: {type(error).__name__}: {error}") from error
        raise FaultyRunError(f"{type(error).__name__}: {error}") from error


def is_infrastructure(error: BaseException) -> bool:
    """Whether an exception says something about the machine rather than about the faulty model."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("out of memory", "can't allocate memory", "cuda error", "cublas_status", "cudnn_status")
    )


def golden_run(
    model: nn.Module,
    batches: Batches,
    output: Output,
    state: Snapshot | None = None,
    randomness: RandomState | None = None,
) -> Tensor:
    """The fault-free outputs, checked: one row a sample, no NaN, and the same bits when run again.

    What a forward writes is put back after every batch, so that no batch depends on those before it.

    Args:
        model: in eval mode.
        batches: what it answers.
        output: picks the tensor to judge.
        state: of the model; one is made if none is given.
        randomness: pinned before every batch; learns which generators are drawn from.

    Raises:
        DataError: if the model rejects a batch or returns something else.
        ModelError: if outputs hold NaN (naming the first layer that makes one) or are not repeatable.
    """
    state = state or Snapshot(model)
    pin = randomness.pin if randomness is not None else lambda: None
    outputs: list[Tensor] = []
    for i, (inputs, size) in enumerate(zip(batches.inputs, batches.sizes, strict=True)):
        pin()
        try:
            raw = call(model, inputs)
        except Exception as error:
            state.restore()
            if is_infrastructure(error):
                raise InfrastructureError(f"golden run, batch {i}: {type(error).__name__}: {error}") from error
            raise DataError(
                f"the model rejects batch {i} (inputs: {_shapes(inputs)}): {type(error).__name__}: {error}"
            ) from error
        picked = _picked(raw, output, i)
        if picked.dim() == 0 or picked.shape[0] != size:
            raise DataError(
                f"batch {i} has {size} targets but the model's output has the shape {tuple(picked.shape)}; the first "
                f"dimension must count samples"
            )
        if outputs and picked.shape[1:] != outputs[0].shape[1:]:
            raise DataError(
                f"outputs a sample have the shape {tuple(picked.shape[1:])} in batch {i} but "
                f"{tuple(outputs[0].shape[1:])} before; every sample needs the same classes"
            )
        if bool(torch.isnan(picked).any()):
            raise ModelError(
                f"the fault-free model gives NaN on batch {i}; {_first_nan(model, inputs)}. No fault can be judged "
                f"against that: repair the model or leave the sample out"
            )
        outputs.append(picked.detach().cpu().clone())
        if randomness is not None:
            randomness.look()
        state.verify()
    if randomness is not None:
        randomness.settle()
    pin()
    again = answered(call(model, batches.inputs[0]), output)
    state.verify()
    if not torch.equal(bit_pattern(outputs[0]), bit_pattern(again)):
        written = f" (it writes {', '.join(sorted(state.written)[:5])}, which was put back)" if state.written else ""
        raise ModelError(
            "two fault-free runs of batch 0 differ, so 'masked' would mean nothing: something in the model stays "
            f"random in eval mode or keeps state between calls where it cannot be put back{written}. Remove it; on "
            "CUDA try torch.use_deterministic_algorithms(True)"
        )
    return torch.cat(outputs)


def unlike(
    model: nn.Module,
    batches: Batches,
    output: Output,
    golden: Tensor,
    state: Snapshot | None = None,
    randomness: RandomState | None = None,
) -> str:
    """How a copy of a model answers otherwise, without faults, than the model itself did; "" if bit by bit it does not.

    Args:
        model: the copy.
        batches: what it answers.
        output: picks the tensor to judge.
        golden: the model's answers.
        state: of the copy; one is made if none is given.
        randomness: pinned before every batch.
    """
    state = state or Snapshot(model)
    wrong = 0
    with eval_mode(model), one_thread(torch.device("cpu")):
        for i, inputs in enumerate(batches.inputs):
            if randomness is not None:
                randomness.pin()
            found = answered(call(model, inputs), output)
            if state.changed():
                state.restore()
            expected = golden[batches.part(i)]
            if found.shape != expected.shape:
                return f"in outputs of shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
            differ = bit_pattern(found) != bit_pattern(expected)
            wrong += int(differ.reshape(len(differ), -1).any(dim=1).sum())
    return f"for {wrong} of {batches.samples} samples" if wrong else ""


def _picked(raw: Any, output: Output, batch: int) -> Tensor:
    """As `pick`, for a function of the user's that has not proven yet that it fits what the model returns."""
    try:
        return pick(raw, output)
    except FlipproofError:
        raise
    except Exception as error:
        raise DataError(
            f"output= raises {type(error).__name__}: {error} on what the model returns for batch {batch}, "
            f"{describe(raw)}"
        ) from error


def _first_nan(model: nn.Module, inputs: Any) -> str:
    """Names the first module, in order of execution, whose output holds NaN."""
    found: list[str] = []

    def watch(name: str, module: nn.Module, result: Any) -> None:
        if _holds_nan(result):
            found.append(f"{name} ({type(module).__name__})")

    with hooked({name: module for name, module in model.named_modules() if name}, watch):
        call(model, inputs)
    if _holds_nan(inputs):
        return "its inputs already hold NaN"
    return f"the first layer to do so is {found[0]}" if found else "it arises outside any submodule"


def _holds_nan(values: Any) -> bool:
    leaves = pytree.tree_leaves(values)
    return any(isinstance(t, Tensor) and t.is_floating_point() and bool(torch.isnan(t).any()) for t in leaves)


def _shapes(inputs: Any) -> str:
    leaves = pytree.tree_leaves(inputs)
    return ", ".join(f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in leaves)
