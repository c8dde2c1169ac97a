"""What every hardening has to do, as a pytest class to inherit."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import FrozenInstanceError
from functools import partial
from typing import ClassVar

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import flipproof
from flipproof.errors import DataError, FlipproofWarning, ModelError
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.report import hardening_report

Batches = list[tuple[Tensor, Tensor]]


class HardeningContract:
    """Inherit, set `method`, and pytest runs the contract on it.

    Attributes:
        method: the hardening under test. Take short searches and a generous accuracy budget: the network is tiny.

    Example:
        In a test file, for a hardening of one's own::

            from flipproof.testing import HardeningContract


            class TestMine(HardeningContract):
                method = Mine(share=0.8)
    """

    method: ClassVar[Hardening]

    def network(self) -> nn.Module:
        """An untrained network with two ReLU and normalisation, in training mode but for its first layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = nn.Sequential(
                *(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
            )
        net.train()
        net[0].eval()
        net[2].weight.requires_grad_(False)
        return net

    def data(self) -> Batches:
        """Two calibration batches, 48 samples."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(48, 4, generator=generator)
        with torch.no_grad():
            y = self.network().eval()(x).argmax(dim=1)
        y[:3] = torch.arange(3)
        return [(x[:24], y[:24]), (x[24:], y[24:])]

    def hardened(self, model: nn.Module) -> nn.Module:
        """The method applied to a model; that it costs accuracy on a dozen held-out samples is no breach."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*costs accuracy", FlipproofWarning)
            return harden(model, self.method, data=self.data(), progress=False)

    def test_frozen_and_rebuilt_from_its_repr(self) -> None:
        names = {
            **{name: getattr(flipproof, name) for name in flipproof.__all__},
            type(self.method).__name__: type(self.method),
        }
        assert eval(repr(self.method), names) == self.method
        with pytest.raises(FrozenInstanceError):
            self.method.anything = 1  # type: ignore[attr-defined]

    def test_the_model_itself_is_untouched(self) -> None:
        model = self.network()
        before = copy.deepcopy(model)
        generators = torch.get_rng_state()
        self.hardened(model)
        assert torch.equal(torch.get_rng_state(), generators)
        assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
        assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_only_thresholds_are_added_and_nothing_else_changes(self) -> None:
        model = self.network()
        safe = self.hardened(model)
        before, after = model.state_dict(), safe.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        asks = {name: p.requires_grad for name, p in safe.named_parameters()}
        assert all(asks[name] == p.requires_grad for name, p in model.named_parameters())
        added = [p for name, p in safe.named_parameters() if name not in before]
        assert added
        assert not any(p.requires_grad for p in added)
        assert all(bool(torch.isfinite(p).all()) for p in added)
        assert all(p.grad is None for p in safe.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in safe.modules())
        assert safe.training
        assert hardening_report(safe).thresholds == sum(p.numel() for p in added)

    def test_every_activation_is_bounded_and_reported(self) -> None:
        safe = self.hardened(self.network())
        report = hardening_report(safe)
        assert [site.name for site in report.sites if site.function == "relu"] == ["1:0", "4:0"]
        assert all(isinstance(safe.get_submodule(site.module), Bounded) for site in report.sites)
        assert report.unreachable == ()
        assert report.method == repr(self.method)
        assert isinstance(report.history, pd.DataFrame)
        assert report.forwards >= 2
        assert math.isfinite(report.clean_drop)

    def test_repeatable(self) -> None:
        one, two = self.hardened(self.network()), self.hardened(self.network())
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
        pd.testing.assert_frame_equal(hardening_report(one).history, hardening_report(two).history)

    def test_no_broken_weight_lets_nan_or_infinity_through_an_activation(self) -> None:
        for value in (float("nan"), float("inf"), -float("inf"), 3e38):
            safe = self.hardened(self.network()).eval()
            with torch.no_grad():
                safe.get_parameter("0.weight")[0] = value
            seen: list[Tensor] = []
            for site in hardening_report(safe).sites:
                note = partial(_note, seen)
                safe.get_submodule(site.module).register_forward_hook(note)
            safe(self.data()[0][0])
            assert len(seen) == len(hardening_report(safe).sites) >= 2
            assert all(bool(torch.isfinite(result).all()) for result in seen)

    def test_travels(self) -> None:
        safe = self.hardened(self.network()).eval()
        x = self.data()[0][0]
        for other in (copy.deepcopy(safe), pickle.loads(pickle.dumps(safe)), copy.deepcopy(safe).double().float()):
            assert torch.equal(other(x), safe(x))

    def test_thresholds_are_in_the_fault_space(self) -> None:
        safe = self.hardened(self.network())
        names = {site.name for site in flipproof.FaultSpace(safe).sites}
        assert {name for name, _ in safe.named_parameters()} <= names

    def test_a_dead_layer_and_bad_data_are_refused(self) -> None:
        model = self.network()
        with torch.no_grad():
            model.get_parameter("0.bias").fill_(-1e4)
        with pytest.raises(ModelError, match="1:0"):
            self.hardened(model)
        x, y = self.data()[0]
        with pytest.raises(DataError, match="NaN"):
            harden(self.network(), self.method, data=[(x * float("nan"), y)], progress=False)
        with pytest.raises(DataError):
            harden(self.network(), self.method, data=[], progress=False)


def _note(seen: list[Tensor], module: nn.Module, args: object, result: Tensor) -> None:
    seen.append(result)
