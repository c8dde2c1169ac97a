"""What a network computes before the first bound that trains: once for each sample, not once an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from flipproof._interrupts import check
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.running.data import answered, own
from flipproof.running.resume import Suffixes
from flipproof.running.values import bytes_of, copied, same, separate

BUDGET = 2**30
"""Bytes of activations that are kept at most; where more were needed, every epoch computes the prefix anew."""

LEAST = 0.05
"""Share of a forward that lies before the cut, at least: a shorter prefix is not worth its memory."""

AUDIT_EVERY = 10
"""One batch in so many is computed anew and compared."""


class PrefixDiffers(Exception):
    """A sample's kept values are not the bits that the network computes for it in another batch."""


class Prefix:
    """A model cut in two before the bounds that train, with the values at the cut kept for each sample.

    The second part is the model's own code on the model's own parameters, so its results are the same bits if the
    values at the cut are. Those may depend on the batch that a sample is in, through the kernels that are chosen. So
    the first batch of each size and one in `AUDIT_EVERY` are computed anew and compared, bit by bit.

    Attributes:
        share: of the multiplications of a forward, before the cut.
    """

    def __init__(
        self, head: fx.GraphModule, tail: fx.GraphModule, share: float, fit: list[Tensor], held: list[list[Tensor]]
    ) -> None:
        self._head, self._tail, self.share = head, tail, share
        self._fit, self._held = fit, held
        self._sizes: set[int] = set()
        self._runs = 0
        self.audited = 0
        """Samples whose prefix was computed anew to compare it."""

    def outputs(self, data: Calibration) -> Tensor:
        """What the model answers on the data to accept on, on the CPU.

        Raises:
            PrefixDiffers: if what follows the cut does not run.
        """
        with torch.no_grad():
            return torch.cat([answered(self._behind(copied(live)), data.output) for live in self._held])

    def run(self, inputs: Tensor, rows: Tensor) -> Any:
        """What the model returns on some samples of the data to fit on.

        Args:
            inputs: of these samples.
            rows: their numbers.

        Raises:
            PrefixDiffers: if an audit finds another bit, or what follows the cut does not run.
        """
        live = [values.index_select(0, rows.to(values.device)) for values in self._fit]
        if self._runs % AUDIT_EVERY == 0 or len(rows) not in self._sizes:
            with torch.no_grad():
                if not same(self._head(own(inputs)), live):
                    raise PrefixDiffers
            self.audited += len(rows)
        self._runs += 1
        self._sizes.add(len(rows))
        return self._behind(live)

    def _behind(self, live: list[Tensor]) -> Any:
        check()
        try:
            return self._tail(*live)
        except Exception as error:  # if the model fails here too, it says so when it runs whole
            raise PrefixDiffers from error


class Prefixes:
    """Where a model that trains its bounds stage by stage can be cut; it is traced once for all stages.

    Args:
        model: what trains.
        parts: the data to fit on and the data to accept on.
        budget: bytes of activations to keep at most.
    """

    def __init__(self, model: nn.Module, parts: tuple[Calibration, Calibration], budget: int = BUDGET) -> None:
        self._model, self._parts, self._budget = model, parts, budget

    def before(self, bounds: Iterable[nn.Module], batch_size: int) -> Prefix | None:
        """Cut the model before the first of some bounds, and run all samples up to there.

        The model is in eval mode, and gradients are switched on, as it will run.

        Args:
            bounds: whose thresholds train.
            batch_size: in which the data to fit on will come.

        Returns:
            None where the model runs whole: it cannot be traced faithfully, its samples cannot be taken apart, too much
            would have to be kept, or too little comes before the cut.
        """
        fit, held = self._parts
        wanted = set(bounds)
        names = [name for name, module in self._model.named_modules() if module in wanted]
        cut = 0 if self._traced is None else self._traced.before(names)
        if self._traced is None or cut == 0:
            return None
        head, tail = self._traced.step(0, cut), self._traced.graph(cut)
        size = fit.batches.sizes[0]
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as first:
                live = head(own(fit.batches.inputs[0]))
            if not _by_sample(live, size) or bytes_of(live) / size * (fit.samples + held.samples) > self._budget:
                return None
            with torch.no_grad(), FlopCounterMode(display=False) as second:
                tail(*live)
            flops = first.get_total_flops(), second.get_total_flops()
            if flops[0] < LEAST * sum(flops) or not flops[0]:
                return None
            ordered = fit.some(torch.arange(fit.samples), batch_size).batches.inputs
            with torch.no_grad():
                pieces = [head(own(inputs)) for inputs in ordered]
                kept = [torch.cat(same_value) for same_value in zip(*pieces, strict=True)]
                others = [head(own(inputs)) for inputs in held.batches.inputs]
        except Exception:  # the two parts may fail in any way where the model does not: then it runs whole
            return None
        return Prefix(head, tail, flops[0] / sum(flops), kept, others)

    @cached_property
    def _traced(self) -> _Cut | None:
        fit, held = self._parts
        batches = [*fit.batches.inputs, *held.batches.inputs]
        if fit.cut != (0,) or not all(isinstance(inputs, Tensor) for inputs in batches):
            return None
        traced = _Cut.trace(self._model, batches)
        return traced if isinstance(traced, _Cut) else None


class _Cut(Suffixes):
    """A trace that says where to cut before a bound."""

    def before(self, bounds: Sequence[str]) -> int:
        """Number of graph nodes before the first use of a bound's threshold; 0 if one is not used at all."""
        return min((self._first_use.get(f"{name}.threshold", 0) for name in bounds), default=0)


def _by_sample(live: list[Any], size: int) -> bool:
    """Whether all values are tensors with a row for each sample, in memory of their own."""
    rows = all(isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size for value in live)
    return bool(live) and rows and separate(live)
