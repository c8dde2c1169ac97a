"""FT-ClipAct: the interval search, against the same search written out with campaigns of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import ZeroAbove
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.ft_clipact import FTClipAct, area
from flipproof.hardening.report import hardening_report

Data = list[tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    ("bers", "accuracy", "expected"),
    [
        ([1e-6, 1e-5, 1e-4], [1.0, 0.5, 0.0], 0.5),
        ([1e-6, 1e-5], [0.2, 0.2], 0.2),
        ([1e-6, 1e-5, 1e-3], [1.0, 1.0, 0.4], (1.0 + 2 * 0.7) / 3),
        ([1e-3], [0.7], 0.7),
    ],
)
def test_area_by_hand(bers: list[float], accuracy: list[float], expected: float) -> None:
    assert area(bers, accuracy) == pytest.approx(expected)


pytestmark = pytest.mark.filterwarnings("ignore:FTClipAct costs accuracy:flipproof.FlipproofWarning")
"""Its known weakness; a network this small with so few samples shows it."""


def test_scores_are_those_of_campaigns(mlp: nn.Module, blobs: Data, fitted_on: Any) -> None:
    method = FTClipAct(points=3, rounds=2, bers=(1e-3, 1e-2), trials=6, seed=5, samples=1000, tolerance=0.0, slack=1.0)
    hardened = harden(mlp, method, data=blobs)
    blobs = fitted_on(mlp, blobs, method)
    history = hardening_report(hardened).history
    highest = float(mlp[1](mlp[0](torch.cat([x for x, _ in blobs]))).detach().max())
    first = history[history["round"] == 1]["threshold"].tolist()
    assert first == pytest.approx([highest / 3, 2 * highest / 3, highest], rel=1e-5)
    x, y = torch.cat([x for x, _ in blobs]), torch.cat([y for _, y in blobs])
    # the samples come in an order of the method's own, which cannot change an accuracy
    for row in history.itertuples():
        other: Any = copy.deepcopy(mlp)
        other[1] = ZeroAbove(row.threshold)
        found = fp.assess(
            other,
            data=[(x, y)],
            faults=fp.BitErrorRate([1e-3, 1e-2]),
            format=fp.FixedPoint(),
            trials=6,
            seed=5,
        )
        assert row.area == pytest.approx(area([1e-3, 1e-2], found.summary["accuracy"]), abs=1e-9)
    best = history["area"].max()
    assert float(hardened[1].threshold) == pytest.approx(history[history["area"] == best]["threshold"].max())


def test_later_rounds_look_between_the_neighbours_of_the_best(mlp: nn.Module, blobs: Data) -> None:
    method = FTClipAct(points=4, rounds=3, bers=(1e-3, 1e-2), trials=3, tolerance=0.0)
    history = hardening_report(harden(mlp, method, data=blobs)).history
    seen: dict[float, float] = {}
    for number, rows in history.groupby("round"):
        if number > 1:
            values = sorted(seen)
            best = max(values, key=lambda value: (seen[value], value))
            at = values.index(best)
            low = values[at - 1] if at else 0.0
            high = values[at + 1] if at + 1 < len(values) else best
            assert rows["threshold"].between(low, high).all()
        seen |= dict(zip(rows["threshold"], rows["area"], strict=True))


def test_a_round_without_gain_is_the_last(mlp: nn.Module, blobs: Data) -> None:
    method = FTClipAct(points=2, rounds=9, bers=(1e-3,), trials=1, tolerance=0.5, slack=1.0)
    history = hardening_report(harden(mlp, method, data=blobs)).history
    assert history["round"].max() == 2


def test_rates_that_hit_nothing_are_left_out_or_refused(mlp: nn.Module, blobs: Data) -> None:
    with pytest.raises(ConfigError, match=r"none of the rates .* in 2,176 bits.*use bers above 5e-04"):
        harden(mlp, FTClipAct(), data=blobs)
    hardened = harden(mlp, FTClipAct(bers=(1e-9, 1e-3), trials=2, rounds=1), data=blobs)
    assert any("left out the rates [1e-09]" in note for note in hardening_report(hardened).notes)


def test_thresholds_are_hit_by_the_search_itself(mlp: nn.Module, blobs: Data) -> None:
    hardened = harden(mlp, FTClipAct(bers=(1e-3,), trials=2, rounds=1), data=blobs)
    space = fp.FaultSpace(hardened, format=FTClipAct().format)
    assert space.bits == 32 * (4 * 8 + 8 + 8 * 3 + 3 + 1)


def test_layers_are_searched_in_order_of_execution(blobs: Data) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.late, self.b = nn.Linear(6, 3), nn.ReLU(), nn.Linear(6, 6)
            self.early, self.a = nn.ReLU(), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.late(self.b(self.early(self.a(x)))))  # type: ignore[no-any-return]

    report = hardening_report(harden(Backwards(), FTClipAct(bers=(1e-3,), trials=1, rounds=1, points=2), data=blobs))
    assert [site.name for site in report.sites] == ["early:0", "late:0"]
    assert report.history["stage"].tolist() == ["early:0"] * 2 + ["late:0"] * 2
