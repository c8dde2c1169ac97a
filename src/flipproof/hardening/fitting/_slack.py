"""Slack: how far beyond the largest values seen a bound has to lie, so that right values of unseen inputs pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.profile import Per, Range
from flipproof.hardening.rewriting.sites import ActivationSite, Rewritten

LADDER = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Multiples of the largest values that are tried, from below."""

FOLDS = 4
"""The samples to fit on are taken apart so often: each part is judged under bounds of the others."""

SHARE = 0.005
"""At most this share of the samples may be disturbed."""

FEW = 300
"""With fewer samples a share of one in a hundred goes unseen, so one rung more is taken."""

UNKNOWN = 2.0
"""The slack where the data cannot be taken apart."""


@dataclass(frozen=True)
class Slack:
    """The slack that a search came to.

    Attributes:
        value: bounds lie at so many times the largest values seen.
        samples: that were judged under bounds fitted without them; 0 if nothing could be taken apart.
        disturbed: of them at `value`, or at the rung below where one more was taken.
        rungs: how many were tried.
    """

    value: float
    samples: int
    disturbed: int
    rungs: int

    def __str__(self) -> str:
        said = f"bounds lie at {self.value:g} × the largest values seen"
        if not self.samples:
            return f"{said}: the data to fit on is a single batch that cannot be taken apart, so nothing was tried"
        return (
            f"{said}: under bounds fitted without them, {self.disturbed} of {self.samples:,} samples were disturbed (a "
            f"score moved by more than half the usual lead, or the class changed)"
        )


def widened(seen: Range, per: Per, slack: float, *, rounding: bool = True) -> tuple[Tensor, Tensor]:
    """(low, high) with slack: high + (slack − 1) · reach, where reach is the size of the bound.

    A bound of a neuron or channel that was silent is 0, and any multiple of it too. So reach is at least the mean size
    of the site's bounds, and at least a quarter of the span from low to high.

    Args:
        seen: what was seen at the site.
        per: layer, channel or neuron.
        slack: 1 leaves the bounds where they are.
        rounding: leave room for rounding too: a thousandth of reach, in half precision 16 units in the last place.

    Example:
        >>> seen = Range(torch.tensor(0.0), torch.tensor(4.0), None, None, {(3,)})
        >>> widened(seen, "layer", 1.5, rounding=False)[1]
        tensor(6.)
    """
    low, high = seen.of(per)
    extra = slack - 1.0
    if rounding:
        extra += max(1e-3, 16 * torch.finfo(high.dtype).eps)
    if extra == 0:
        return low, high
    ends = []
    for end, sign in ((low, -1.0), (high, 1.0)):
        reach = torch.maximum(torch.maximum(end.abs(), end.abs().mean()), (high - low) / 4)
        largest = torch.finfo(end.dtype).max
        ends.append((end + sign * extra * reach).clamp(-largest, largest))
    return ends[0], ends[1]


def search_slack(
    rewritten: Rewritten,
    parts: Sequence[Calibration],
    seen: Sequence[Mapping[str, Range]],
    bounds: Mapping[ActivationSite, Bounded],
    per: Mapping[ActivationSite, Per],
    *,
    spend: Callable[[Calibration, float], None],
) -> Slack:
    """The smallest rung of `LADDER` at which hardly any sample is disturbed by bounds that were fitted without it.

    Cross-fitting: each part runs under bounds that come from the other parts. The criterion needs no labels and no
    wrong answer: a network that has memorised its data answers rightly long after its scores have begun to move.

    Args:
        rewritten: the copy, with `bounds` in place; their thresholds are overwritten.
        parts: of the samples to fit on.
        seen: ranges in each part, by module.
        bounds: by site.
        per: granularity of each site.
        spend: counts passes.
    """
    if len(parts) < 2:
        return Slack(UNKNOWN, 0, 0, 0)
    others = [union([ranges for j, ranges in enumerate(seen) if j != i]) for i in range(len(parts))]
    teacher, judge = torch.cat([part.teacher for part in parts]), parts[0].judge
    lead, samples = judge.lead(teacher), len(teacher)
    count = 0
    for rung, slack in enumerate(LADDER):
        count = 0
        for part, ranges in zip(parts, others, strict=True):
            set_bounds(bounds, ranges, per, slack)
            after = part.outputs(rewritten.model)
            count += int(judge.disturbed(after, part.teacher, part.batches.targets, lead).sum())
            spend(part, 1.0)
        if count <= SHARE * samples:
            more = 1 if samples < FEW else 0
            return Slack(LADDER[min(rung + more, len(LADDER) - 1)], samples, count, rung + 1)
    return Slack(LADDER[-1], samples, count, len(LADDER))


def union(parts: Sequence[Mapping[str, Range]]) -> dict[str, Range]:
    """What was seen in any of the parts, by module; the parts stay as they are."""
    found: dict[str, Range] = {}
    for ranges in parts:
        for module, seen in ranges.items():
            if module in found:
                found[module].include(seen)
            else:
                found[module] = replace(seen, shapes=set(seen.shapes))
    return found


def set_bounds(
    bounds: Mapping[ActivationSite, Bounded],
    seen: Mapping[str, Range],
    per: Mapping[ActivationSite, Per],
    slack: float,
    *,
    rounding: bool = True,
) -> None:
    """Write bounds of that slack into modules that are in place; those of which nothing was seen keep theirs."""
    with torch.no_grad():
        for site, bound in bounds.items():
            if site.module not in seen:
                continue
            low, high = widened(seen[site.module], per[site], slack, rounding=rounding)
            bound.threshold.copy_(high)
            if bound.low is not None:
                bound.low.copy_(low)
