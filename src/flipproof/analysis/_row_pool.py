"""Rows of many faulty runs in one forward: what single flips in a tensor of one layer do, sample by sample.

A flip in a tensor that one call of one layer reads changes that layer's output and nothing before it, so the layer
runs on its golden inputs. Behind the layer there is no fault any more: rows of different flips can share a forward.
They are pooled into batches as large as the golden run's, so that the same kernels run, and rows that are golden again
at a later cut, bit by bit, leave: their answer is the golden one.

A flip in a weight of a convolution or linear layer changes one output channel. As many flips as the layer has channels
then share one call of the layer, in which each takes the place of one filter.

All that rests on other rows, places in a batch and places among filters not mattering, to the last bit. It is tried
before a pool is used: golden and faulty rows mixed at random, and filters in another order (`RowPool.proved`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof._interrupts import check
from flipproof._tensors import laid_alike
from flipproof.errors import InfrastructureError
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats.base import word_dtype
from flipproof.running.data import answered
from flipproof.running.evaluation import FaultyRunError, is_infrastructure
from flipproof.running.faulty import FaultyModel
from flipproof.running.resume import Suffixes
from flipproof.running.values import copied, same
from flipproof.spaces.contract import Faults, Positions, WordOutcomes
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.quantised import is_wrapper
from flipproof.spaces.sites import Site

_LOOKS = 1
"""How many cuts behind the layer to look at: later ones see hardly any more rows that are golden again."""

_FILTERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that give an output channel for each row of their weight."""


class Pooled(NamedTuple):
    """What a model answers under single flips.

    Attributes:
        outputs: (flips, samples, …), on the CPU.
        equal: which flips leave every value as it is without faults, bool (flips,).
        words: how the word that each flip hits is read.
    """

    outputs: Tensor
    equal: NDArray[np.bool_]
    words: list[WordOutcomes | None]


_COMPARED, _ORDERS, _MOST_ROUNDS = 20_000, 3, 64
"""Numbers that are compared at least to see that it does not matter where a row or a filter lies, in so many orders of
each of so many batches at most."""


class _Rows(NamedTuple):
    """Rows of one flip at a cut: its number, which samples, and their live values."""

    flip: int
    samples: Tensor
    live: list[Tensor]


class _Change(NamedTuple):
    """What a flip makes of a tensor: the output channel that changes, and its weights or bias; or more than one."""

    flip: int
    channel: int
    values: Tensor


class _Stop:
    """A cut at which rows are pooled: golden values of all samples, and room for a batch.

    Args:
        golden: live values at the cut, samples first.
        held: live values of one batch, laid out as the model has them; filled with others from here on.
        run: from there to the live values at the next stop, or to what the model returns.
    """

    def __init__(self, golden: list[Tensor], held: list[Tensor], run: Callable[..., Any]) -> None:
        self.golden, self.held, self.run = golden, held, run
        batch = held[0].shape[0]
        self.flips, self.samples = np.full(batch, -1), np.zeros(batch, np.int64)
        self.filled = 0

    def differing(self, live: Sequence[Tensor], samples: NDArray[np.int64], known: Collection[int] = ()) -> Tensor:
        """Which rows differ from the golden ones of these samples in any bit, bool (rows,); `known` parts do not."""
        differs = torch.zeros(len(samples), dtype=torch.bool)
        first = int(samples[0])
        in_order = bool((samples == np.arange(first, first + len(samples))).all())  # as samples of one flip are
        for part, (values, golden) in enumerate(zip(live, self.golden, strict=True)):
            if part not in known:
                theirs = golden[first : first + len(samples)] if in_order else _taken(golden, torch.from_numpy(samples))
                differs |= _apart(values, theirs)
        return differs


class RowPool:
    """Answers under single flips of one tensor, from shared forwards of what lies behind its layer.

    Args:
        faulty: the model, stored in its space.
        suffixes: of the model.
        site: the tensor.

    Raises:
        LookupError: saying why its flips cannot share forwards.
    """

    def __init__(self, faulty: FaultyModel, suffixes: Suffixes, site: Site) -> None:
        if not isinstance(faulty.space, FaultSpace):
            raise LookupError("not a space of stored bits")
        before = suffixes.only_use((site.name, *site.aliases))
        if before is None:
            raise LookupError(f"more than one call of a layer reads {site.name}")
        self._faulty, self._suffixes, self._space, self._site = faulty, suffixes, faulty.space, site
        self._tensor = next(cell.tensor for cell in self._space.cells if cell.site is site)
        if self._tensor.device.type != "cpu":
            raise LookupError("rows are pooled on a CPU only")
        if not suffixes.row_wise_from(before + 1):
            raise LookupError(f"a step behind {site.name} may look at more than one sample")
        self._before = before
        self._batch = faulty.batches.sizes[0]
        many = [name for name, held in faulty.model.named_parameters(remove_duplicate=False) if held.dim() > 1]
        looks = [cut for cut in suffixes.uses(many) if cut > before + 1][:_LOOKS]
        cuts = [before + 1, *looks]
        golden, held = self._record(cuts)
        steps = [suffixes.step(cut, end).forward for cut, end in zip(cuts, looks, strict=False)]
        runs = [*steps, suffixes.graph(cuts[-1]).forward]
        self._stops = [_Stop(golden[cut], held[cut], run) for cut, run in zip(cuts, runs, strict=True)]
        self._place = suffixes.place(before + 1)
        self._golden_tensor = self._tensor.detach().clone()
        self._layer = self._filters()
        self._outputs = faulty.golden[None]

    def _record(self, cuts: list[int]) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
        """Golden values at each cut, of all samples and of the first batch; what the layer reads is kept by batch."""
        faulty = self._faulty
        batches = [self._suffixes.record(inputs, [self._before, *cuts]) for inputs in faulty.batches.inputs]
        self._inputs: list[list[Any]] = []
        found: dict[int, list[Tensor]] = {}
        for recorded, size in zip(batches, faulty.batches.sizes, strict=True):
            for cut in (self._before, *cuts):
                if cut not in recorded:
                    raise LookupError("values behind the layer share memory")
            self._inputs.append(recorded[self._before])
            for cut in cuts:
                live = recorded[cut]
                if not live or not all(isinstance(part, Tensor) and part.shape[:1] == (size,) for part in live):
                    raise LookupError("what is computed behind the layer is not one row a sample")
        for cut in cuts:
            parts = zip(*(recorded[cut] for recorded in batches), strict=True)
            try:
                found[cut] = [torch.cat(part) for part in parts]
            except RuntimeError as error:
                raise LookupError(f"batches differ in shape behind the layer ({error})") from None
        return found, {cut: copied(batches[0][cut]) for cut in cuts}

    def _filters(self) -> nn.Module | None:
        """The layer, if each row of its weight or bias gives one channel of its output."""
        node = self._suffixes.last_node(self._before + 1)
        layer = self._suffixes.modules()[str(node.target)]
        plain = type(layer) in _FILTERS and not (layer._forward_hooks or layer._forward_pre_hooks)
        if not plain or len(node.args) != 1 or node.kwargs or getattr(layer, "groups", 1) != 1:
            return None
        held: Any = layer
        if is_wrapper(held.weight):  # whose words are no rows that a filter could be made of
            return None
        return layer if self._tensor is held.weight or self._tensor is held.bias else None

    def answers(self, positions: Positions) -> Pooled:
        """What the model answers under each of these flips alone.

        Args:
            positions: global bit numbers, all of the tensor.

        Raises:
            FaultyRunError: if a forward raises; it is not known for which flip.
        """
        golden = self._faulty.golden
        self._outputs = golden[None].expand(len(positions), *golden.shape).clone()
        equal, words = np.zeros(len(positions), bool), list[WordOutcomes | None]()
        try:
            for rows in self._changed_rows(positions, equal, words):
                self._put(0, np.full(rows.samples.numel(), rows.flip), rows.samples.numpy(), rows.live)
            for stop in range(len(self._stops)):
                if self._stops[stop].filled:
                    self._run(stop)
        finally:
            for one in self._stops:
                one.filled = 0
                one.flips[:] = -1
        return Pooled(self._outputs, equal, words)

    def proved(self) -> bool:
        """Whether it does not matter with which rows, and where among them, a row runs, nor where a filter lies.

        Golden rows, and others like them, must give the same answers in any order: small products take the rows at the
        end of a batch another way, which a few numbers may not show. Rows under two flips are mixed with golden rows:
        each must answer as among its own kind. Golden rows must stay golden among rows that hold the largest values of
        either sign, infinities or NaN.
        Filters, and others like them, must give the same output in any order, in that order; else each flip has its own
        run of the layer.
        """
        generator = TrialGenerator(0, f"rows of {self._site.name}", 0)
        try:
            if not self._filters_alone(generator):
                self._layer = None
            return (
                self._rows_alone(generator) and self._unmoved_by_extremes(generator) and self._in_any_order(generator)
            )
        except FaultyRunError:
            return False

    def _rows_alone(self, generator: TrialGenerator) -> bool:
        golden, first = self._faulty.golden, self._stops[0].golden
        order = torch.from_numpy(_shuffled(generator, golden.shape[0]))
        for part in _wrapped(order, self._batch):
            if not same(self._through([values.index_select(0, part) for values in first]), golden[part]):
                return False
        site, rows = self._site, torch.arange(self._batch)
        word, bit = int(generator.below(site.words, 1)[0]), int(generator.below(site.bits, 1)[0])
        high = site.positions(max(site.width - 2, 0))  # the highest exponent bit of a float
        kinds = [[values[: self._batch] for values in first]]
        for position in (int(high[min(word, high.size - 1)]), bit):
            faulty = [values.clone() for values in first]
            for found in self._changed_rows(np.array([site.offset + position]), np.zeros(1, bool), []):
                for values, changed in zip(faulty, found.live, strict=True):
                    values[found.samples] = changed
            kinds.append([values[: self._batch] for values in faulty])
        answers = [self._through(kind) for kind in kinds]
        choice = torch.from_numpy(generator.below(len(kinds), self._batch))
        moved = torch.from_numpy(_shuffled(generator, self._batch))
        mixed = [torch.stack(parts)[choice[moved], rows[moved]] for parts in zip(*kinds, strict=True)]
        return same(self._through(mixed), torch.stack(answers)[choice[moved], rows[moved]])

    def _in_any_order(self, generator: TrialGenerator) -> bool:
        """Whether rows like the golden ones answer the same wherever they are in a batch."""
        golden = [values[: self._batch] for values in self._stops[0].golden]
        for _ in range(_rounds(self._faulty.golden[: self._batch].numel())):
            live = [_varied(values, generator) for values in golden]
            answers = self._through(live)
            for _ in range(_ORDERS):
                order = torch.from_numpy(_shuffled(generator, self._batch))
                if not same(self._through([values.index_select(0, order) for values in live]), answers[order]):
                    return False
        return True

    def _unmoved_by_extremes(self, generator: TrialGenerator) -> bool:
        """Whether golden rows answer as ever while an eighth of the layer's output is extreme in half of the rows."""
        hit = _shuffled(generator, self._batch)[: self._batch // 2]
        others = torch.ones(self._batch, dtype=torch.bool)
        others[torch.from_numpy(hit)] = False
        golden = [values[: self._batch] for values in self._stops[0].golden]
        made = golden[self._place]
        if not made.is_floating_point() or not len(hit):
            return True
        largest = torch.finfo(made.dtype).max
        for extreme in (largest, -largest, float("inf"), float("-inf"), float("nan")):
            live, rows = [values.clone() for values in golden], torch.from_numpy(hit)
            values = made[rows].clone()
            which = torch.from_numpy(generator.below(8, values.numel())).reshape(values.shape) == 0
            live[self._place][rows] = values.masked_fill(which, extreme)
            if not same(self._through(live)[others], self._faulty.golden[: self._batch][others]):
                return False
        return True

    def _filters_alone(self, generator: TrialGenerator) -> bool:
        if self._layer is None:
            return True
        layer: Any = self._layer
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        for batch in range(len(self._inputs)):
            if not same(self._called(weight, bias, batch), self._golden_output(batch)):
                return False
            for number in range(_rounds(self._golden_output(batch).numel())):
                tried = _varied(weight, generator) if number else weight
                found = self._called(tried, bias, batch) if number else self._golden_output(batch)
                for _ in range(_ORDERS):
                    order = torch.from_numpy(_shuffled(generator, weight.shape[0]))
                    moved = tried.clone()  # laid out as the weight is
                    moved[:] = tried[order]
                    there = self._called(moved, None if bias is None else bias[order], batch)
                    if not same(there, found.index_select(self._axis, order)):
                        return False
        return True

    def _through(self, live: list[Tensor]) -> Tensor:
        """What the model answers for a batch of rows at the first stop."""
        laid = copied(self._stops[0].held)
        for held, values in zip(laid, live, strict=True):
            held.copy_(values)
        live = laid
        for stop in self._stops[:-1]:
            live = _run(stop.run, live)
        return self._picked(_run(self._stops[-1].run, live))

    def _picked(self, raw: Any) -> Tensor:
        try:
            found = answered(raw, self._faulty.output)
        except Exception as error:  # output= is the user's
            raise FaultyRunError(f"{type(error).__name__}: {error}") from error
        if found.shape != (self._batch, *self._faulty.golden.shape[1:]):
            raise FaultyRunError(f"outputs of shape {tuple(found.shape)}")
        return found

    def _put(self, number: int, flips: NDArray[np.int64], samples: NDArray[np.int64], live: list[Tensor]) -> None:
        """Pool rows at a stop; whenever there is a batch of them, it runs."""
        stop, taken = self._stops[number], 0
        laid = all(laid_alike(values, held) for values, held in zip(live, stop.held, strict=True))
        if laid and not stop.filled and len(flips) == self._batch:  # a batch already
            self._run(number, flips, samples, live)
            return
        while taken < len(flips):
            count = min(self._batch - stop.filled, len(flips) - taken)
            here, there = slice(stop.filled, stop.filled + count), slice(taken, taken + count)
            for held, values in zip(stop.held, live, strict=True):
                held[here] = values[there]
            stop.flips[here], stop.samples[here] = flips[there], samples[there]
            stop.filled += count
            taken += count
            if stop.filled == self._batch:
                self._run(number)

    def _run(
        self,
        number: int,
        flips: NDArray[np.int64] | None = None,
        samples: NDArray[np.int64] | None = None,
        live: list[Tensor] | None = None,
    ) -> None:
        """A batch of rows from one stop to the next, or to the answers; by default what is pooled there."""
        stop = self._stops[number]
        if flips is None or samples is None or live is None:
            flips, samples, live = stop.flips.copy(), stop.samples.copy(), stop.held
            flips[stop.filled :] = -1  # rows of earlier batches fill the batch up, and nobody reads them
            stop.filled = 0
        versions = _versions(part for i, part in enumerate(live) if i != self._place)
        found = _run(stop.run, live)
        real = flips >= 0
        if number + 1 == len(self._stops):
            rows = torch.from_numpy(np.flatnonzero(real))
            self._outputs[torch.from_numpy(flips[real]), torch.from_numpy(samples[real])] = self._picked(found)[rows]
            return
        # behind the layer, only its own output differs: what is handed on as it is needs no second look
        known = [i for i, part in enumerate(found) if not number and versions.get(id(part)) == part._version]
        differs = self._stops[number + 1].differing(found, samples, known).numpy() & real
        if differs.all():
            self._put(number + 1, flips, samples, found)
        elif differs.any():
            rows = torch.from_numpy(np.flatnonzero(differs))
            self._put(number + 1, flips[differs], samples[differs], [_taken(values, rows) for values in found])

    def _changed_rows(
        self, positions: Positions, equal: NDArray[np.bool_], words: list[WordOutcomes | None]
    ) -> Iterator[_Rows]:
        """The rows whose layer output each flip changes; also notes which flips are read as without faults."""
        waiting: list[_Change] = []
        for flip, position in enumerate(positions.tolist()):
            draw = Faults(np.array([position], np.int64))
            with self._space.corrupted(draw):
                equal[flip] = self._space.as_stored
                change = None if equal[flip] or self._layer is None else self._one_channel(flip)
                alone = [] if equal[flip] or change is not None else self._alone(flip)
            words.append(self._space.word_outcomes)
            yield from alone
            if change is not None:
                waiting.append(change)
                if len(waiting) == self._slots:
                    yield from self._together(waiting)
                    waiting = []
        if waiting:
            yield from self._together(waiting)

    def _one_channel(self, flip: int) -> _Change | None:
        """The fault that is in place, if it changes one output channel."""
        channels = _apart(self._tensor.detach(), self._golden_tensor).nonzero()[:, 0]
        if channels.numel() != 1:
            return None
        channel = int(channels[0])
        return _Change(flip, channel, self._tensor.detach()[channel].clone())

    @property
    def _slots(self) -> int:
        return int(self._tensor.shape[0])

    @property
    def _axis(self) -> int:
        """Which axis of the layer's output counts channels."""
        return -1 if isinstance(self._layer, nn.Linear) else 1

    def _golden_output(self, batch: int) -> Tensor:
        return self._stops[0].golden[self._place][self._faulty.batches.part(batch)]

    def _called(self, weight: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """The layer's output on golden inputs with other weights."""
        layer: Any = self._layer
        node: Any = self._suffixes.last_node(self._before + 1)
        given = self._inputs[batch][self._suffixes.place(self._before, node.args[0])]
        found: Tensor = (
            F.linear(given, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(given, weight, bias)
        )
        return found

    def _together(self, changes: Sequence[_Change]) -> Iterator[_Rows]:
        """Flips that change one channel each: all in one call of the layer, each in the place of one filter."""
        layer: Any = self._layer
        weight = layer.weight.detach().clone()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        channels = torch.tensor([change.channel for change in changes], device=weight.device)
        for slot, change in enumerate(changes):
            weight[slot], hit = layer.weight.detach()[change.channel], weight
            if bias is not None:
                bias[slot] = layer.bias.detach()[change.channel]
                hit = bias if self._tensor is layer.bias else weight
            hit[slot] = change.values
        axis = self._axis
        for batch in range(len(self._inputs)):
            found = _run(lambda batch=batch: self._called(weight, bias, batch), [])
            made = found.narrow(axis, 0, len(changes)).movedim(axis, 1)
            golden = self._golden_output(batch).index_select(axis, channels).movedim(axis, 1)
            size = made.shape[0]
            differs = (_bits(made) != _bits(golden)).reshape(size, len(changes), -1).any(dim=2)
            first = self._faulty.batches.part(batch).start
            for slot, change in enumerate(changes):
                rows = differs[:, slot].nonzero()[:, 0]
                if not rows.numel():
                    continue
                if rows.numel() == size:
                    live = [values[first : first + size].clone() for values in self._stops[0].golden]
                    changed = made[:, slot]
                else:
                    live = [_taken(values, rows + first) for values in self._stops[0].golden]
                    changed = made[:, slot].index_select(0, rows)
                live[self._place].select(axis, change.channel).copy_(changed)
                yield _Rows(change.flip, rows + first, live)

    def _alone(self, flip: int) -> list[_Rows]:
        """The fault that is in place, by a call of the layer of its own."""
        step = self._suffixes.step(self._before, self._before + 1).forward
        rows = []
        for batch, inputs in enumerate(self._inputs):
            given = copied(inputs)
            versions = _versions(given)
            found = _run(step, given)
            if any(versions.get(id(part)) != part._version for i, part in enumerate(found) if i != self._place):
                raise FaultyRunError("the layer changes what it is given")
            size = self._faulty.batches.sizes[batch]
            samples = torch.arange(size) + self._faulty.batches.part(batch).start
            handed_on = [part for part in range(len(found)) if part != self._place]
            differs = self._stops[0].differing(found, samples.numpy(), handed_on).nonzero()[:, 0]
            if differs.numel() == size:
                rows.append(_Rows(flip, samples, found))
            elif differs.numel():
                rows.append(_Rows(flip, samples[differs], [_taken(values, differs) for values in found]))
        return rows


def pool_of(faulty: FaultyModel, suffixes: Suffixes | None, site: Site) -> RowPool | None:
    """The pool of a tensor's flips, if it is proved that they can share forwards.

    Args:
        faulty: the model, stored in its space.
        suffixes: of the model; None if it could not be traced.
        site: the tensor.
    """
    if suffixes is None or callable(faulty.output):  # which may look at all rows, and only under faults
        return None
    try:
        pool = RowPool(faulty, suffixes, site)
    except LookupError:
        return None
    return pool if pool.proved() else None


def _run(function: Callable[..., Any], live: Sequence[Any]) -> Any:
    """Call what lies between two cuts.

    Raises:
        FaultyRunError: if it raises on its own account.
        InfrastructureError: if memory ran out or the device failed.
    """
    check()
    try:
        return function(*live)
    except Exception as error:
        if is_infrastructure(error):
            raise InfrastructureError(f"a pooled batch: {type(error).__name__}: {error}") from error
        raise FaultyRunError(f"{type(error).__name__}: {error}") from error


def _versions(live: Iterable[Tensor]) -> dict[int, int]:
    """By the identity of a tensor: its version, which counts what is written to it."""
    return {id(part): part._version for part in live}


def _bits(values: Tensor) -> Tensor:
    """The bits of values as integers, where they lie."""
    return values.view(word_dtype(8 * values.element_size())) if values.is_floating_point() else values


def _apart(left: Tensor, right: Tensor) -> Tensor:
    """Which rows differ in any bit, bool (rows,)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return torch.ones(right.shape[0], dtype=torch.bool, device=right.device)
    if all(part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last) for part in (left, right)):
        left, right = left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)  # as they lie in memory
    mine, theirs = (_bits(part).reshape(left.shape[0], -1) for part in (left, right))
    if _fits(mine) and _fits(theirs):  # eight bytes at a time are fewer numbers to look at
        mine, theirs = mine.view(torch.int64), theirs.view(torch.int64)
    differs = mine != theirs
    return (differs.view(torch.int64) if _fits(differs) else differs).any(dim=1)


def _fits(rows: Tensor) -> bool:
    """Whether rows are whole numbers of eight bytes, one behind the other."""
    size = rows.element_size()
    return bool(rows.is_contiguous() and rows.shape[1] * size % 8 == 0 and rows.storage_offset() * size % 8 == 0)


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows, laid out as all of them are: channels last stay last."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return values.index_select(0, rows)


def _shuffled(generator: TrialGenerator, count: int) -> NDArray[np.int64]:
    """0 to `count` − 1 in random order."""
    return np.argsort(generator.below(2**62, count), kind="stable")


def _wrapped(order: Tensor, batch: int) -> list[Tensor]:
    """All of `order` in parts of `batch`, the last one filled up from the start."""
    whole = -(-order.numel() // batch) * batch
    return list(order.repeat(-(-whole // order.numel()))[:whole].reshape(-1, batch))


def _rounds(numbers: int) -> int:
    """Batches, each in `_ORDERS` orders, after which enough numbers were compared."""
    return min(_MOST_ROUNDS, max(1, -(-_COMPARED // max(1, _ORDERS * numbers))))


def _varied(values: Tensor, generator: TrialGenerator) -> Tensor:
    """Random values of that size, three quarters of them positive, so that a rectifier leaves sums of many terms.

    They are laid out as the given ones; integers stay as they are.
    """
    if not values.is_floating_point():
        return values
    finite = torch.nan_to_num(values.double(), 0.0, 0.0, 0.0)
    size = float(finite.square().mean().sqrt()) or 1.0
    drawn = torch.from_numpy(generator.below(2**52, values.numel()) / 2**51 - 0.5).reshape(values.shape)
    return values.clone().copy_(drawn * size)
