"""What a hardening costs without faults, judged on samples that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flipproof._hooks import hooked
from flipproof.campaigns.statistics import mean_interval, wilson_interval
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.rewriting.sites import Rewritten
from flipproof.running.data import answered, call
from flipproof.running.evaluation import eval_mode

LIMIT = 0.01
"""`harden` warns if more accuracy than this is lost on the held-out samples, or any loss is significant."""

ROUNDING_SAMPLES = 32
"""So many held-out samples are run alone and together, to see whether rounding alone changes answers."""


@dataclass(frozen=True)
class Acceptance:
    """Held-out samples before and after a hardening, pair by pair.

    Attributes:
        samples: held out.
        right: that the original model gets right.
        lost: right before, wrong after.
        won: wrong before, right after.
        changed: whose class changes, right or wrong.
        disturbed: of which a score moves by more than half the usual lead of the best score, or the class
            changes. It needs no labels, and says more than accuracy where the model has memorised its data.
        drop: accuracy lost, (lost − won) / samples, a fraction; negative for a gain.
        low: of the 95 % interval of the drop, over samples (`paired_interval`).
        high: the same.
    """

    samples: int
    right: int
    lost: int
    won: int
    changed: int
    disturbed: int
    drop: float
    low: float
    high: float

    @classmethod
    def of(cls, held: Calibration, hardened: nn.Module) -> Acceptance:
        """Judge a hardened model on samples of which the unbounded model's answers are known."""
        judge, after, targets = held.judge, held.outputs(hardened), held.batches.targets
        before, now = (judge.quality(each, targets, held.teacher) for each in (held.teacher, after))
        lost, won, n = int((now < before).sum()), int((now > before).sum()), held.samples
        whole = bool((((before == 0) | (before == 1)) & ((now == 0) | (now == 1))).all())
        if whole:  # each answer is right or wrong
            low, high = paired_interval(lost, won, int((before + now == 2).sum()), n)
        else:
            low, high = mean_interval((before - now).numpy(), bounds=(-1, 1))
        moved = judge.disturbed(after, held.teacher, targets, judge.lead(held.teacher))
        return cls(
            samples=n,
            right=int((before == 1).sum()),
            lost=lost,
            won=won,
            changed=int(judge.critical(held.teacher, after, targets).sum()),
            disturbed=int(moved.sum()),
            drop=float((before - now).mean()) if not whole else (lost - won) / n,
            low=low,
            high=high,
        )

    @property
    def costs(self) -> bool:
        """Whether accuracy is lost: more than `LIMIT`, or so that chance does not explain it."""
        return self.drop > LIMIT or self.low > 0

    def __str__(self) -> str:
        return (
            f"without faults, on {self.samples:,} held-out samples: {100 * self.drop:.2f} points lost "
            f"[{100 * self.low:.2f}, {100 * self.high:.2f}] ({self.lost} answers lost, {self.won} won; scores of "
            f"{self.disturbed} move by more than half the usual lead)"
        )


def paired_interval(lost: int, won: int, both: int, samples: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of (lost − won) / samples, the difference of two accuracies on the same samples.

    Method 10 of Newcombe 1998: Wilson's intervals of both accuracies, combined
    with the correlation of the pairs.

    Args:
        lost: right before, wrong after.
        won: wrong before, right after.
        both: right before and after.
        samples: of all.
        confidence: of the interval.

    Example:
        >>> [round(end, 4) for end in paired_interval(12, 2, 36, 50)]  # as in Newcombe's table II
        [0.0569, 0.3404]
    """
    neither = samples - lost - won - both
    first, second = (both + lost) / samples, (both + won) / samples
    low_1, high_1 = wilson_interval(both + lost, samples, confidence=confidence)
    low_2, high_2 = wilson_interval(both + won, samples, confidence=confidence)
    product = float(both + lost) * (won + neither) * (both + won) * (lost + neither)
    together = float(both) * neither - float(lost) * won
    if together > 0:
        together = max(together - samples / 2, 0.0)
    phi = together / product**0.5 if product > 0 else 0.0
    below, above = first - low_1, high_2 - second
    down = (below**2 - 2 * phi * below * above + above**2) ** 0.5
    below, above = second - low_2, high_1 - first
    up = (below**2 - 2 * phi * below * above + above**2) ** 0.5
    drop = first - second
    return max(-1.0, drop - down), min(1.0, drop + up)


def unsteady_layers(model: nn.Module, rewritten: Rewritten, held: Calibration) -> list[str]:
    """Sites at which a sample's values change when it is run alone, by far more than they do in the unbounded model.

    Sums are rounded in another order in another batch size. A bound that lies at a value which right inputs reach turns
    that into a step.

    Args:
        model: the unbounded model.
        rewritten: the bounded copy.
        held: samples, which must be such that they can be cut one by one.

    Returns:
        Names of sites, all where none can be told; empty if batch 1 and batch N agree as well as they do in `model`.
    """
    count = min(ROUNDING_SAMPLES, held.samples)
    some = held.some(torch.arange(count), count)
    singles = [held.some(torch.tensor([i])) for i in range(count)]
    plain = _together_and_alone(model, some, singles)
    bounded = _together_and_alone(rewritten.model, some, singles)
    spacing = torch.finfo(some.teacher.dtype).eps
    room = 10 * float((plain[0] - plain[1]).abs().max()) + 1e3 * spacing * float(plain[0].abs().max())
    apart = ~((bounded[0] - bounded[1]).abs().reshape(some.samples, -1).amax(dim=1) <= room)
    if not bool(apart.any()):
        return []
    number = int(apart.nonzero()[0, 0])
    whole = _site_values(rewritten, some)
    alone = _site_values(rewritten, singles[number])
    found = []
    for site in rewritten.sites:
        for one, other in zip(whole.get(site.module, []), alone.get(site.module, []), strict=False):
            if one.dim() and one.shape[0] == some.samples and one[number].shape == other[0].shape:
                scale = float(one.abs().max())
                if float((one[number] - other[0]).abs().max()) > 1e-3 * scale:
                    found.append(site.name)
                    break
    return found or [site.name for site in rewritten.sites]


def _together_and_alone(model: nn.Module, some: Calibration, singles: list[Calibration]) -> tuple[Tensor, Tensor]:
    with eval_mode(model):
        joined = torch.cat([answered(call(model, x), some.output) for x in some.batches.inputs])
        alone = torch.cat([answered(call(model, one.batches.inputs[0]), some.output) for one in singles])
    return joined.detach().double().cpu(), alone.detach().double().cpu()


def _site_values(rewritten: Rewritten, data: Calibration) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}
    places = {site.module: rewritten.model.get_submodule(site.module) for site in rewritten.sites}
    bounds = {name: place for name, place in places.items() if isinstance(place, Bounded)}

    def note(name: str, module: nn.Module, result: Tensor) -> None:
        seen.setdefault(name, []).append(result.detach().double().cpu())

    with eval_mode(rewritten.model), hooked(bounds, note):
        for inputs in data.batches.inputs:
            call(rewritten.model, inputs)
    return seen
