"""Several trials a forward: copies of the stored tensors, one a slot, and the model run on all of them by `torch.func`.

A small network on an accelerator waits for launches, not for arithmetic, and a launch serves all slots. Each slot has a
model of its own, whose tensors are its part of the stack: the slot's space hits them where they lie, as it hits any
model, so flips, words and undoing are those of single trials. One of these models is run, by `torch.func.vmap` over
`torch.func.functional_call`, with the whole stack in the place of its tensors. The user's model is not written to.

Batched kernels may round otherwise than single ones, so fault-free is what the stack answers without faults. That the
slots are computed apart, and alike, is proved on the model and the machine at hand before it is relied on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence

from flipproof._interrupts import check, whole
from flipproof._tensors import same_bits
from flipproof.errors import FlipproofWarning, InfrastructureError, ModelError
from flipproof.running.data import Batches, Output, call, own, pick
from flipproof.running.evaluation import Answers, FaultyRunError, answer, is_infrastructure, run_faulty
from flipproof.running.faulty import FaultyModel, same_answers
from flipproof.running.snapshots import Snapshot
from flipproof.running.values import same
from flipproof.spaces.contract import Draw
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.quantised import every_tensor

_SLOW = "There is a performance drop"
"""How torch begins to say that it runs an operator slot by slot."""


Change = Callable[[Tensor], Tensor]
"""Makes other values of those of a tensor."""


def refusal(slots: int, why: str) -> ModelError:
    """What is said of a model that cannot be run so."""
    return ModelError(f"together={slots} cannot be had: {why}. Leave together= out: trials then run one by one")


class StackedModel:
    """So many models in one forward, each with faults of its own.

    It holds the tensors of the space once a slot, and once more where a format stores values that are not the tensor's
    own (their originals); all other tensors are the model's. It must be `stored()` while it runs.

    Args:
        model: in eval mode; it is not written to.
        space: of the model.
        batches: what it answers.
        output: picks the tensor to judge.
        slots: how many.

    Raises:
        ModelError: if a tensor of the space cannot be stacked, or the model cannot be copied.
    """

    def __init__(self, model: nn.Module, space: FaultSpace, batches: Batches, output: Output, slots: int) -> None:
        self.batches, self.output, self.slots = batches, output, slots
        self._reference = space.tensors
        originals = space.originals()
        names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.stacks: dict[str, Tensor] = {}
        """The tensors of the space by their names in the model; the first axis counts slots."""
        self._names: dict[str, str] = {}
        replaced: list[dict[int, Tensor]] = [{} for _ in range(slots)]
        for site, tensor in self._reference.items():
            name = names.get(id(tensor))
            if name is None or not tensor.is_floating_point():
                raise refusal(slots, f"{site} is no parameter or buffer that holds floating-point values as they are")
            values = originals.get(site, tensor).detach()
            stack = torch.empty((slots, *values.shape), dtype=values.dtype, device=values.device)
            stack.copy_(values)
            self.stacks[name], self._names[site] = stack, name
            for slot, own_tensor in enumerate(stack):
                is_parameter = isinstance(tensor, nn.Parameter)
                replaced[slot][id(tensor)] = nn.Parameter(own_tensor, False) if is_parameter else own_tensor
        shared = {id(t): t for t in every_tensor(model).values() if id(t) not in replaced[0]}
        try:
            models = [deepcopy(model, {**shared, **mine}) for mine in replaced]
        except Exception as error:  # copying runs code of the model's own
            raise refusal(slots, f"the model cannot be copied ({type(error).__name__}: {error})") from error
        self._model, self._original = models[0], model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlipproofWarning)  # the space itself has said it
            self._spaces = [space.again(each) for each in models]
        self.slow: set[str] = set()
        """What torch said of operators that it runs slot by slot."""

    @whole
    def stored(self) -> Iterator[StackedModel]:
        """While active, every slot computes with what the formats of the space can represent."""
        with ExitStack() as all_of_them:
            for space in self._spaces:
                all_of_them.enter_context(space.stored())
            self._state = Snapshot(self._model, like=self._original)
            self._versions = self._counted()
            yield self

    def answers(self, draws: Mapping[int, Draw], batch: int | None = None) -> dict[int, Answers]:
        """What the slots answer with these faults, the other slots being without; nothing waits for the device.

        If the forward raises, every draw is run once more without the others, to see whose fault it was.

        Args:
            draws: by the number of the slot.
            batch: the only one to run; None for all of them.

        Raises:
            ModelError: if the forward wrote to what it was given.
        """
        some = range(len(self.batches.inputs)) if batch is None else (batch,)
        flips: dict[int, int] = {}
        words = {}
        with ExitStack() as faults:
            for slot, draw in draws.items():
                flips[slot] = faults.enter_context(self._spaces[slot].corrupted(draw))
                words[slot] = self._spaces[slot].word_outcomes
            try:
                outputs, error = torch.cat([self.forward(i) for i in some], dim=1).cpu(), None
            except FaultyRunError as failure:
                outputs, error = None, str(failure)[:500]
            except RuntimeError as failure:  # a device says only now what went wrong there
                if is_infrastructure(failure):
                    raise InfrastructureError(f"{type(failure).__name__}: {failure}") from failure
                raise
        self._check_unwritten()
        if outputs is None and len(draws) > 1:
            return {slot: self.answers({slot: draw}, batch)[slot] for slot, draw in draws.items()}
        return {
            slot: Answers(None if outputs is None else outputs[slot], flips[slot], error, words[slot]) for slot in draws
        }

    def forward(self, batch: int) -> Tensor:
        """The answers of all slots to a batch, where the model is: (slots, samples, …).

        Raises:
            FaultyRunError: if the model raises, or torch cannot batch what it does.
            InfrastructureError: if memory ran out or the device failed.
        """
        check()
        inputs = own(self.batches.inputs[batch])
        arguments, named = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        if isinstance(inputs, PackedSequence) or not isinstance(inputs, (tuple, list, Mapping)):
            arguments = (inputs,)

        def one(tensors: dict[str, Tensor]) -> Tensor:
            return pick(functional_call(self._model, tensors, tuple(arguments), dict(named)), self.output)

        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, which nothing batches
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found: Tensor = vmap(one, randomness="error")(self.stacks)
        except Exception as error:
            if is_infrastructure(error):
                raise InfrastructureError(f"batch {batch}: {type(error).__name__}: {error}") from error
            raise FaultyRunError(f"{type(error).__name__}: {error}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        for warning in said:
            if str(warning.message).startswith(_SLOW):
                self.slow.add(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return found.detach()

    def differing(self) -> list[str]:
        """Tensors of which a slot, without faults, does not hold the bits that the model holds."""
        pairs = [(site, self.stacks[self._names[site]], tensor) for site, tensor in self._reference.items()]
        return [site for site, stack, golden in pairs if not all(same_bits(mine, golden) for mine in stack)]

    @property
    def epsilon(self) -> float:
        """Of the coarsest type that it computes with."""
        return max(torch.finfo(stack.dtype).eps for stack in self.stacks.values())

    def put(self, site: str, slot: int, change: Change) -> None:
        """Change a tensor of one slot."""
        self.stacks[self._names[site]][slot].data.copy_(change(self._reference[site].detach()))

    def take_back(self, site: str, slot: int) -> None:
        """Its values as they are without faults."""
        self.stacks[self._names[site]][slot].data.copy_(self._reference[site].detach())

    def _counted(self) -> list[int]:
        return [stack._version for stack in self.stacks.values()]

    def _check_unwritten(self) -> None:
        if self._counted() != self._versions or self._state.changed():
            written = self._state.restore()
            raise refusal(
                self.slots,
                f"its forward writes to {', '.join(written[:5]) or 'parameters or buffers'}, and what a slot leaves "
                f"there would be in the next trial",
            )


@contextmanager
def stacked(faulty: FaultyModel, slots: int) -> Iterator[tuple[StackedModel, Tensor]]:
    """A stack of the model that a golden run was made of, and its own golden answers.

    Raises:
        ModelError: saying why trials of this model cannot share a forward.
    """
    space = faulty.space
    if not isinstance(space, FaultSpace):
        raise refusal(slots, "only faults in stored parameters share a forward")
    if any(cell.packed is not None for cell in space.cells):
        raise refusal(slots, "the model holds packed words, which every slot would have to unpack")
    if faulty.state.written:
        raise refusal(slots, f"its forward writes to {', '.join(sorted(faulty.state.written)[:5])}")
    if faulty.randomness.drawn:
        raise refusal(slots, "its forward draws random numbers")
    if shared := _sharing(faulty, space):
        raise refusal(slots, f"{' and '.join(shared[:3])} share memory, and a copy of them would not")
    stack = StackedModel(faulty.model, space, faulty.batches, faulty.output, slots)
    with stack.stored():
        yield stack, _golden_run(stack, faulty)


def _sharing(faulty: FaultyModel, space: FaultSpace) -> list[str]:
    """Names of tensors that lie in the memory of one that can be hit, and of that one."""
    hit = {id(tensor) for tensor in space.tensors.values()}
    lying: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in faulty.state.tensors:
        lying.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for there in lying.values():
        if len(there) > 1 and any(id(tensor) in hit for _, tensor in there):
            return sorted(name for name, _ in there)
    return []


def _golden_run(stack: StackedModel, faulty: FaultyModel) -> Tensor:
    """What the stack answers without faults, which every slot must answer alike, and a second time.

    Raises:
        ModelError: if they do not, or answer something else than the model does.
    """
    if wrong := stack.differing():
        raise refusal(stack.slots, f"a copy of the model does not store {wrong[0]} as the model does")
    outputs = []
    for batch in range(len(faulty.batches.inputs)):
        try:
            found = stack.forward(batch).cpu()
            again = found if batch else stack.forward(batch).cpu()
        except FaultyRunError as error:
            raise refusal(stack.slots, f"torch.func.vmap cannot run it on batch {batch}: {str(error)[:500]}") from error
        alone = faulty.golden[faulty.batches.part(batch)]
        if found.shape[1:] != alone.shape or found.dtype != alone.dtype:
            raise refusal(stack.slots, f"it answers {found.dtype} of shape {tuple(found.shape[1:])} there")
        if not all(same(slot, found[0]) for slot in (*found, *again)):
            raise refusal(stack.slots, f"slots without faults answer batch {batch} with other bits than each other")
        if not _close(found[0], alone, stack.epsilon):
            raise refusal(stack.slots, f"it answers batch {batch} otherwise than by itself, by more than rounding")
        outputs.append(found[0].clone())
    stack._check_unwritten()
    if stack.slow:
        operators = sorted(message.partition("rule for ")[2].partition(".")[0] for message in stack.slow)
        warnings.warn(
            f"torch runs {', '.join(operators)} slot by slot: together={stack.slots} saves nothing there",
            FlipproofWarning,
            stacklevel=6,
        )
    return torch.cat(outputs)


def _close(one: Tensor, other: Tensor, epsilon: float) -> bool:
    """Whether two answers differ by rounding: by no more than √ε of the largest."""
    finite = torch.isfinite(other)
    if not torch.equal(finite, torch.isfinite(one)):
        return False
    one, other = one[finite].double(), other[finite].double()
    return not one.numel() or bool((one - other).abs().max() <= epsilon**0.5 * other.abs().max())


def prove(stack: StackedModel, faulty: FaultyModel, draws: Sequence[Draw]) -> None:
    """Try that slots are computed apart from each other, all alike, and with the faults that are put there.

    On a batch of each size: with NaN, and with huge values, in every tensor of half of the slots, the others answer as
    without faults, bit by bit; a draw gives the same bits alone, among other draws, and in every slot. On the smallest
    batch: each tensor in turn, with other values, gives what it gives in the model itself, but for rounding.

    Args:
        stack: without faults.
        faulty: the model itself, with the golden answers of the stack.
        draws: some of the campaign's.

    Raises:
        ModelError: saying what is not so.
    """
    sizes = faulty.batches.sizes
    for batch in sorted({size: batch for batch, size in reversed([*enumerate(sizes)])}.values()):
        _prove_apart(stack, faulty, batch)
        _prove_alike(stack, batch, draws)
    _prove_hit(stack, faulty, min(range(len(sizes)), key=lambda batch: sizes[batch]))
    if wrong := stack.differing():
        raise refusal(stack.slots, f"its forward writes to {wrong[0]} where no version counter sees it")


def _prove_apart(stack: StackedModel, faulty: FaultyModel, batch: int) -> None:
    golden, sites = faulty.golden[faulty.batches.part(batch)], [site.name for site in faulty.space.sites]
    for what, change in (("NaN", _nan), ("huge", _huge)):
        for first in (0, 1):
            hit = range(first, stack.slots, 2)
            found = _changed(stack, batch, dict.fromkeys(hit, sites), change)
            if found is None:  # all slots raise for what is in some: each trial is then run without the others
                continue
            if not all(same(found[slot], golden) for slot in range(1 - first, stack.slots, 2)):
                raise refusal(stack.slots, f"{what} values in some slots change what other slots answer")


def _prove_alike(stack: StackedModel, batch: int, draws: Sequence[Draw]) -> None:
    every = range(stack.slots)
    answers: list[list[Answers]] = [[] for _ in draws]
    for turn in range(2):  # each in two slots at least, beside others
        which = {slot: (slot + turn) % len(draws) for slot in every}
        for slot, found in stack.answers({slot: draws[i] for slot, i in which.items()}, batch).items():
            answers[which[slot]].append(found)
    answers[0] += stack.answers(dict.fromkeys(every, draws[0]), batch).values()
    for i, draw in enumerate(draws[:2]):
        answers[i].append(stack.answers({i: draw}, batch)[i])
    if not all(same_answers(each[0], other) for each in answers for other in each[1:]):
        raise refusal(stack.slots, "the same faults give other bits in another slot, or beside other faults")


def _prove_hit(stack: StackedModel, faulty: FaultyModel, batch: int) -> None:
    sites = [site.name for site in faulty.space.sites]
    for first in range(0, len(sites), stack.slots):
        some = sites[first : first + stack.slots]
        found = _changed(stack, batch, {slot: [site] for slot, site in enumerate(some)}, _shifted)
        for slot, site in enumerate(some):
            among = _changed(stack, batch, {slot: [site]}, _shifted) if found is None else found
            single = _single(faulty, batch, site)
            if among is None or single is None:
                alike = among is None and single is None
            else:
                alike = _close(among[slot], single, stack.epsilon)
            if not alike:
                raise refusal(
                    stack.slots, f"what is put into {site} does not reach all that the model computes with it"
                )


def _nan(values: Tensor) -> Tensor:
    return torch.full_like(values, torch.nan)


def _huge(values: Tensor) -> Tensor:
    return torch.full_like(values, torch.finfo(values.dtype).max)


def _shifted(values: Tensor) -> Tensor:
    """By a quarter of the mean magnitude; by a quarter where all are zero."""
    size = values.double().abs().mean()
    return values + torch.where(size > 0, size, 1.0).to(values.dtype) / 4


def _changed(stack: StackedModel, batch: int, sites: Mapping[int, Sequence[str]], change: Change) -> Tensor | None:
    """What all slots answer with these tensors, by slot, changed; None if the forward raises."""
    try:
        for slot, names in sites.items():
            for name in names:
                stack.put(name, slot, change)
        return stack.forward(batch).cpu()
    except FaultyRunError:
        return None
    finally:
        for slot, names in sites.items():
            for name in names:
                stack.take_back(name, slot)


def _single(faulty: FaultyModel, batch: int, site: str) -> Tensor | None:
    """What the model itself answers with a tensor shifted; None if it raises."""
    space = faulty.space
    assert isinstance(space, FaultSpace)
    tensor = space.tensors[site].data

    @whole
    def with_others() -> Iterator[int]:
        golden = tensor.clone()
        try:
            tensor.copy_(_shifted(golden))
            yield 0
        finally:
            tensor.copy_(golden)

    def run(_: int) -> Tensor:
        return answer(lambda: call(faulty.model, faulty.batches.inputs[batch]), faulty.output, batch)

    return run_faulty(1, run, with_others, faulty.state, faulty.randomness).outputs
