"""What every fault model has to do, as a pytest class to inherit."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import flipproof
from flipproof.errors import FaultModelError
from flipproof.faults import FaultModel, TrialGenerator
from flipproof.formats.base import bit_pattern
from flipproof.spaces.contract import Draw, Faults
from flipproof.spaces.parameters import FaultSpace


class FaultModelContract:
    """Inherit, set `model`, and pytest runs the contract on it and on each point of its sweep.

    Attributes:
        model: the fault model under test. Take values at which it hits something but not everything in `space`.

    Example:
        In a test file, for a fault model of one's own::

            from flipproof.testing import FaultModelContract


            class TestBursts(FaultModelContract):
                model = Bursts(length=[2, 4])
    """

    model: ClassVar[FaultModel]

    def network(self) -> nn.Module:
        """The network whose parameters are hit; the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))

    def space(self) -> FaultSpace:
        """The fault space that is drawn from: 3,520 bits unless overridden."""
        return FaultSpace(self.network())

    def draw(self, point: FaultModel, trial: int, seed: int = 0) -> Draw:
        """The faults of one trial, as a campaign draws them."""
        return point.draw(self.space(), TrialGenerator(seed, point.stream, trial))

    def test_repr_rebuilds_the_model(self) -> None:
        names = {
            **{name: getattr(flipproof, name) for name in flipproof.__all__},
            type(self.model).__name__: type(self.model),
        }
        for model in (self.model, *self.model.points()):
            assert eval(repr(model), names) == model

    def test_frozen_hashable_and_picklable(self) -> None:
        assert len({self.model, pickle.loads(pickle.dumps(self.model))}) == 1
        with pytest.raises(FrozenInstanceError):
            self.model.anything = 1  # type: ignore[attr-defined]

    def test_points_are_single_and_told_apart_by_their_coordinates(self) -> None:
        points = self.model.points()
        assert points
        for point in points:
            assert point.points() == (point,)
        coordinates = [point.coordinates() for point in points]
        assert all(c.keys() == coordinates[0].keys() and c for c in coordinates)
        assert len({json.dumps(c, sort_keys=True) for c in coordinates}) == len(points)

    def test_coordinates_survive_json(self) -> None:
        for point in self.model.points():
            coordinates = point.coordinates()
            assert json.loads(json.dumps(coordinates, allow_nan=False)) == coordinates
            assert all(type(value) in (int, float) for value in coordinates.values())

    def test_a_sweep_is_not_drawn_from(self) -> None:
        if len(self.model.points()) > 1:
            with pytest.raises(FaultModelError, match="points"):
                self.draw(self.model, 0)

    def test_check_accepts_the_space(self) -> None:
        for point in self.model.points():
            point.check(self.space())

    def test_draws_are_distinct_sorted_bits_of_the_space(self) -> None:
        bits = self.space().bits
        for point in self.model.points():
            for trial in range(20):
                faults = self.draw(point, trial)
                assert isinstance(faults, Faults)
                positions = faults.positions
                assert positions.dtype == np.int64
                assert positions.ndim == 1
                assert bool((np.diff(positions) > 0).all())
                assert len(faults) == 0 or (positions[0] >= 0 and positions[-1] < bits)
                assert faults.stuck in (None, 0, 1)

    def test_draws_something(self) -> None:
        for point in self.model.points():
            assert sum(len(self.draw(point, trial)) for trial in range(20)) > 0

    def test_a_draw_is_a_function_of_seed_point_and_trial_alone(self) -> None:
        jobs = [(point, trial) for point in self.model.points() for trial in range(5)]
        forward = [self.draw(point, trial).digest for point, trial in jobs]
        torch.manual_seed(99)
        np.random.default_rng(99).random(10)
        backward = [self.draw(point, trial).digest for point, trial in reversed(jobs)]
        assert forward == backward[::-1]

    def test_drawing_leaves_global_generators_alone(self) -> None:
        before = torch.get_rng_state()
        legacy = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
        for point in self.model.points():
            point.draw(self.space(), TrialGenerator(0, point.stream, 0))
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], legacy)  # type: ignore[index]  # noqa: NPY002

    def test_trials_and_seeds_differ_unless_the_point_repeats(self) -> None:
        for point in self.model.points():
            trials = {self.draw(point, trial).digest for trial in range(20)}
            seeds = {self.draw(point, 0, seed).digest for seed in range(20)}
            if point.repeats(self.space()):
                assert len(trials | seeds) == 1
            else:
                assert len(trials) > 1
                assert len(seeds) > 1

    def test_the_model_comes_back_bit_for_bit(self) -> None:
        network = self.network()
        space = FaultSpace(network)
        before = [p.detach().clone() for p in network.parameters()]
        for point in self.model.points():
            with space.corrupted(point.draw(space, TrialGenerator(0, point.stream, 0))) as changed:
                bits = sum(_differing(p.detach(), b) for p, b in zip(network.parameters(), before, strict=True))
                assert bits == changed
            assert all(
                torch.equal(bit_pattern(p.detach()), bit_pattern(b))
                for p, b in zip(network.parameters(), before, strict=True)
            )


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(_words(a), _words(b), strict=True))


def _words(tensor: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in bit_pattern(tensor).reshape(-1).tolist()]
