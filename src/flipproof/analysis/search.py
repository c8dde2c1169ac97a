"""Searching the smallest critical error (Ahmadilivani et al. 2023): gallop, bisect, narrow, and look for holes."""

from __future__ import annotations

from math import inf, nan

import torch
from torch import Tensor

from flipproof.analysis._two_phase import CRITICAL, HARMLESS, PROVEN, TRIED
from flipproof.analysis.probes import Probe


class Search:
    """The searches of some pairs of a sample and a place, in lockstep: every round asks one question of each.

    Args:
        probe: who answers.
        rows: samples of the batch, int64 (pairs,).
        places: neurons or weights, int64 (pairs,).
        skip: pairs of which only NaN and signed-zero flips are tested; all others count as harmless; bool (pairs,).
        exhaustive: try every bit.
        tolerance: of `ranges`.
        decide: search; without, only `truth` can be asked for.

    Attributes:
        critical: which bits of which pairs are critical, bool (pairs, bits).
        nans: flips that make a NaN, and those of them that are critical, bool (pairs, bits, 2).
    """

    def __init__(
        self,
        probe: Probe,
        rows: Tensor,
        places: Tensor,
        *,
        skip: Tensor | None = None,
        exhaustive: bool = False,
        tolerance: float = 0.05,
        decide: bool = True,
    ) -> None:
        device = probe.values.device
        self._probe, self._tolerance = probe, tolerance
        self._rows, self._places = rows.to(device), places.to(device)
        self._golden = probe.values[self._rows, self._places]
        self._skip = torch.zeros_like(self._rows, dtype=torch.bool) if skip is None else skip.to(device)
        self._faulty = probe.flips(self._rows, self._places)
        self._delta = self._faulty.double() - self._golden.double()[:, None]
        self._flags = torch.zeros(self._faulty.shape, dtype=torch.bool, device=device)
        self._tried = torch.zeros_like(self._flags)
        if not decide:
            return
        everything = exhaustive or probe.last
        # NaN and a changed sign of zero have no place in an order of errors: they are tried themselves
        self._try(torch.ones_like(self._flags) if everything else ~((self._delta > 0) | (self._delta < 0)))
        self._sides = [self._side(sign, everything) for sign in (1, -1)]

    @property
    def critical(self) -> Tensor:
        return self._flags.cpu()

    @property
    def nans(self) -> Tensor:
        made = torch.isnan(self._faulty)
        return torch.stack([made, made & self._flags], dim=2).cpu()

    def _try(self, which: Tensor) -> None:
        pair, bit = which.nonzero(as_tuple=True)
        self._flags[pair, bit] = self._ask(pair, self._faulty[pair, bit])
        self._tried |= which

    def _ask(self, pairs: Tensor, values: Tensor) -> Tensor:
        return self._probe.critical(self._rows[pairs], self._places[pairs], values)

    def _side(self, sign: int, everything: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the bit flips with errors of this sign, as magnitudes: the largest with no critical one up to it, the
        smallest critical one, the largest harmless one, and the smallest with all critical from it on; 0 and inf where
        there is none. The first and third, and the second and fourth, differ where there are holes.
        """
        size = self._delta * sign
        member = size > 0
        order = torch.where(member, size, nan).sort(dim=1, stable=True)  # NaN sorts behind an error of +inf
        count = member.sum(dim=1)
        index = torch.arange(self._flags.shape[1], device=count.device)
        if everything:
            flags = self._flags.gather(1, order.indices) & (index < count[:, None])
            first = torch.where(flags.any(dim=1), flags.int().argmax(dim=1), count)
            calm = ~flags & (index < count[:, None])
            after = torch.where(calm, index + 1, 0).amax(dim=1)
        else:
            after = first = self._first_critical(order.indices, count)
            flags = (index >= first[:, None]) & (index < count[:, None])
            self._flags |= torch.zeros_like(self._flags).scatter_(1, order.indices, flags)
        sizes = order.values
        last = sizes.shape[1] - 1

        def before(place: Tensor) -> Tensor:
            return torch.where(place > 0, sizes.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0.0)

        def at(place: Tensor) -> Tensor:
            return torch.where(place < count, sizes.gather(1, place.clamp(max=last)[:, None])[:, 0], inf)

        return before(first), at(first), before(after), at(after)

    def _first_critical(self, order: Tensor, count: Tensor) -> Tensor:
        """Index of the first critical flip in each row of `order`: gallop down from the largest, then bisect."""
        low, high = torch.where(self._skip, count, 0), count.clone()
        jump, galloping = torch.ones_like(count), torch.ones_like(count, dtype=torch.bool)
        while bool((active := (low < high).nonzero()[:, 0]).numel()):
            lo, hi = low[active], high[active]
            place = torch.where(galloping[active], (hi - jump[active]).clamp(min=lo), (lo + hi) // 2)
            bit = order[active, place]
            hit = self._ask(active, self._faulty[active, bit])
            self._tried[active, bit] = True
            high[active], low[active] = torch.where(hit, place, hi), torch.where(hit, lo, place + 1)
            jump[active] *= 2
            galloping[active] &= hit
        return high

    def ranges(self, *, narrow: bool = True) -> Tensor:
        """Per pair: harmless down to, critical from there down, harmless up to, critical from there up, as errors;
        float64 (pairs, 4). `narrow` asks between the bit flips that were tried. Holes that were found lie in the gap
        between harmless and critical.
        """
        parts = []
        for sign, (near, first, last, far) in zip((-1, 1), self._sides[::-1], strict=True):
            if narrow:
                holed = last > near
                near, reached = self._narrowed(sign, near, first, torch.ones_like(holed))
                far = torch.where(holed, self._narrowed(sign, last, far, holed)[1], reached)
            parts += [sign * near, sign * far]
        return torch.stack(parts, dim=1).cpu()

    def _narrowed(self, sign: int, harmless: Tensor, critical: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of the gaps of these pairs, moved towards each other."""
        harmless, critical = harmless.clone(), critical.clone()
        top = torch.finfo(self._golden.dtype).max
        which = which & ~self._skip
        everyone = which.nonzero()[:, 0]
        # no finite error was critical yet: ask for the largest there is
        open_ended = everyone[torch.isinf(critical[everyone])]
        self._move(sign, open_ended, torch.full_like(harmless[open_ended], top), harmless, critical)
        for _ in range(40):
            wide = torch.isfinite(critical) & (critical > harmless.clamp(min=1e-30) * (1 + self._tolerance))
            active = (wide & which).nonzero()[:, 0]
            if not active.numel():
                break
            near, far = harmless[active], critical[active]
            middle = (near.clamp(min=1e-30).sqrt() * far.sqrt()).clamp(max=2 * top)
            # errors below the last place of the value are no errors: there is nothing between the two ends
            moved = self._move(sign, active, middle, harmless, critical)
            if not bool(moved.any()):
                break
        return harmless, critical

    def _move(self, sign: int, pairs: Tensor, middle: Tensor, harmless: Tensor, critical: Tensor) -> Tensor:
        """Ask for errors of about `middle`, and move one end of each range to what was really asked."""
        top = torch.finfo(self._golden.dtype).max
        golden = self._golden[pairs].double()
        values = (golden + sign * middle).clamp(-top, top).to(self._golden.dtype)
        asked = (values.double() - golden) * sign
        new = (asked > harmless[pairs]) & (asked < critical[pairs])
        pairs, values, asked = pairs[new], values[new], asked[new]
        hit = self._ask(pairs, values)
        critical[pairs[hit]] = asked[hit]
        harmless[pairs[~hit]] = asked[~hit]
        return new

    @property
    def left(self) -> Tensor:
        """What became of each flip without being tried, int8 (pairs, bits): `HARMLESS` or `CRITICAL` as the search has
        it, or `PROVEN` harmless; `TRIED` for the others.
        """
        found = torch.where(self._flags, CRITICAL, HARMLESS).to(torch.int8)
        found[self._tried] = TRIED
        pair, bit = (~self._tried).nonzero(as_tuple=True)
        proven = self._probe.unseen(self._rows[pair], self._places[pair], self._faulty[pair, bit])
        found[pair[proven], bit[proven]] = PROVEN
        return found

    def truth(self, which: Tensor) -> Tensor:
        """Whether these flips are critical when they are injected, bool (pairs, bits); False for all others."""
        pair, bit = which.to(self._flags.device).nonzero(as_tuple=True)
        found = torch.zeros_like(self._flags)
        found[pair, bit] = self._probe.truth(self._rows[pair], self._places[pair], self._faulty[pair, bit])
        return found
