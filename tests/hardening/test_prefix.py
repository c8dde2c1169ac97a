"""Training from kept values at the cut is training with whole forwards, bit by bit."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.datasets import digits
from flipproof.hardening.bounds.bounded import Smooth
from flipproof.hardening.fitting._prefix import Prefix, PrefixDiffers, Prefixes
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.work import put_bound
from flipproof.hardening.rewriting.sites import rewrite
from flipproof.models import digits_cnn, resnet20

METHOD = fp.ProAct(epochs=2, epochs_last=4, lr=0.05, batch_size=24, budget=0.5, slack=1.0)
pytestmark = pytest.mark.filterwarnings("ignore:(FitAct|ProAct) costs accuracy:flipproof.FlipproofWarning")


class Steps(nn.Module):
    """Joins samples of a batch before the last ReLU: what is kept of a sample depends on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.flatten(1)))
        hidden = hidden + 1e-3 * hidden.mean(dim=0)
        return self.last(torch.relu(self.second(hidden)))


def network(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    if name == "resnet20":
        x = torch.randn(80, 3, 8, 8)
        return resnet20().eval(), [(x[i : i + 20], torch.arange(20) % 10) for i in range(0, 80, 20)]
    return (digits_cnn() if name == "digits_cnn" else Steps()).eval(), digits("train", batch_size=50)[:3]


def hardened(model: nn.Module, data: list[tuple[Tensor, Tensor]], method: fp.Hardening) -> nn.Module:
    return fp.harden(model, method, data=data, progress=False)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    pd.testing.assert_frame_equal(
        fp.hardening_report(one).history, fp.hardening_report(other).history, check_exact=True
    )


@pytest.mark.parametrize("name", ["resnet20", "digits_cnn", "joined"])
@pytest.mark.parametrize("method", [METHOD, fp.FitAct(epochs=3, lr=0.05, batch_size=24, budget=0.5, slack=1.0)])
def test_the_same_bits_as_whole_forwards(name, method, monkeypatch):
    model, data = network(name)
    kept = hardened(model, data, method)
    monkeypatch.setattr(Prefixes, "before", lambda *args: None)
    whole = hardened(model, data, method)
    assert_same(kept, whole)
    if method is METHOD and name != "joined":
        assert fp.hardening_report(kept).forwards < fp.hardening_report(whole).forwards


def cut(model: nn.Module, data: list[tuple[Tensor, Tensor]], **options: int) -> tuple[Prefix | None, Calibration]:
    calibration = Calibration.read(model, data, torch.device("cpu"))
    rewritten = rewrite(model, data[0][0])
    bounds = [put_bound(rewritten, site, Smooth, torch.tensor(2.0)) for site in rewritten.sites]
    parts = calibration.split(0.25, 0)
    return Prefixes(rewritten.model.eval(), parts, **options).before(bounds[-1:], 24), parts[0]


def test_a_sample_that_depends_on_its_batch_is_found():
    found, fit = cut(*network("joined"))
    assert found is not None
    rows = 2 * torch.arange(24)
    with pytest.raises(PrefixDiffers):
        found.run(torch.cat(fit.batches.inputs)[rows], rows)


def test_one_batch_in_ten_is_compared_again():
    found, fit = cut(*network("digits_cnn"))
    assert found is not None
    inputs = torch.cat(fit.batches.inputs)
    for _ in range(10):
        found.run(inputs[:24], torch.arange(24))
    with pytest.raises(PrefixDiffers):
        found.run(inputs[:24] + 1, torch.arange(24))


def test_no_more_is_kept_than_the_budget_allows():
    model, data = network("digits_cnn")
    assert cut(model, data, budget=10**6)[0] is not None
    assert cut(model, data, budget=1000)[0] is None
