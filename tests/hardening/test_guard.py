from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.datasets import digits
from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.hardening.methods.guard import Guard, GuardedLinear
from flipproof.hardening.report import hardening_report
from flipproof.models import digits_cnn
from flipproof.models.training import train_classifier
from flipproof.spaces.parameters import FaultSpace


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, 6, 6, generator=generator)
    return [(x[:20], torch.arange(20) % 3), (x[20:], torch.arange(20) % 3)]


@pytest.fixture
def conv():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))


def seen(model: nn.Module, images) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in images])


@pytest.mark.parametrize(("replace", "kind"), [("zero", ZeroAbove), ("bound", Saturate)])
def test_bounds_are_the_largest_values_of_each_channel(conv, images, replace, kind, fitted_on):
    hardened = fp.harden(conv, Guard(replace=replace, slack=1.0), data=images)
    images = fitted_on(conv, images, Guard())
    assert type(hardened[1]) is type(hardened[4]) is kind
    assert torch.equal(hardened[1].threshold, seen(conv[:2], images).amax((0, 2, 3)).reshape(4, 1, 1))
    assert torch.equal(hardened[4].threshold, seen(conv[:5], images).amax(0))
    scores = seen(conv, images)
    assert torch.equal(hardened[5].threshold, scores.amax(0) + (scores.amax(0) - scores.min()))
    assert hardened[5].rest == scores.min()
    report = hardening_report(hardened)
    assert report.thresholds == 4 + 5 + 3 + 1
    assert report.slack == 1.0
    # golden run 1, ranges ¾ twice (of all sites, and to place bounds), held out ¼, rounding 2 · ¼
    assert report.forwards == pytest.approx(1 + 2 * 0.75 + 0.25 + 0.5)
    assert "the outputs of 5 are guarded by 4 stored values" in report.notes


def test_clean_data_is_left_alone(conv, images, fitted_on):
    hardened = fp.harden(conv, Guard(), data=images)
    images = fitted_on(conv, images, Guard())
    assert torch.equal(seen(hardened, images), seen(conv, images))


def test_a_broken_class_score_cannot_win(conv, images):
    """A high bit in one weight of the last layer: without the guard its class wins wherever the neuron is alive."""
    x, _ = images[0]
    for outputs in (False, True):
        hardened = fp.harden(conv, Guard(outputs=outputs), data=images)
        golden = hardened(x)
        space = FaultSpace(hardened)
        alive = int(conv[:5](x).amin(0).argmax())
        with torch.no_grad():
            hardened[5].weight[1, alive] = 0.5
        with space.corrupted(space.faults([("5.weight", 5 + alive, 30)])):
            broken = hardened(x)
        hit = conv[:5](x)[:, alive] > 0
        assert hit.any()
        if outputs:
            assert (broken[hit].argmax(1) != 1).all()
            assert torch.equal(broken[:, [0, 2]], golden[:, [0, 2]])
        else:
            assert (broken[hit].argmax(1) == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38, -1e38])
def test_always_finite_whatever_is_broken(value):
    plain = nn.Linear(3, 4)
    for name in ("weight", "bias", "threshold", "rest"):
        guarded = GuardedLinear(copy.deepcopy(plain), torch.ones(4), torch.tensor(-1.0))
        with torch.no_grad():
            getattr(guarded, name).view(-1)[0] = value
        assert bool(torch.isfinite(guarded(torch.randn(5, 3) * 10)).all()), name


def test_travels_like_a_linear_layer(conv, images, tmp_path):
    hardened = fp.harden(conv, Guard(), data=images)
    for other in (copy.deepcopy(hardened), pickle.loads(pickle.dumps(hardened))):
        assert torch.equal(other(images[0][0]), hardened(images[0][0]))
    hardened.load_state_dict(conv.state_dict(), strict=False)
    missing, unexpected = hardened.load_state_dict(conv.state_dict(), strict=False)
    assert unexpected == []
    assert set(missing) == {"1.threshold", "4.threshold", "5.threshold", "5.rest"}
    exported = torch.export.export(hardened.eval(), (images[0][0],)).module()
    assert torch.equal(exported(images[0][0]), hardened(images[0][0]))


def test_what_cannot_be_guarded_is_said():
    x = [(torch.randn(8, 3), torch.arange(8) % 2)]
    one = fp.harden(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), Guard(), data=x)
    assert "single score" in " ".join(hardening_report(one).notes)
    assert type(one[2]) is nn.Linear
    soft = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(dim=1))
    assert "the outputs are not guarded" in " ".join(hardening_report(fp.harden(soft, Guard(), data=x)).notes)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    assert "called once" in " ".join(hardening_report(fp.harden(Twice(), Guard(), data=x)).notes)


def test_sequences_get_one_bound_a_layer_and_maps_of_any_size_one_a_channel():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.two(torch.relu(self.one(x))).mean(dim=1)

    x = torch.randn(8, 5, 3)
    data = [(x, torch.arange(8) % 3), (x[:, :3], torch.arange(8) % 3)]
    assert hardening_report(fp.harden(Tokens(), Guard(), data=data)).thresholds == 1
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    data = [(torch.randn(4, 1, n, n), torch.arange(4) % 2) for n in (6, 8)]
    assert fp.harden(net, Guard(), data=data)[1].threshold.shape == (2, 1, 1)


@pytest.mark.parametrize("bad", [{"per": "row"}, {"replace": "mean"}])
def test_nonsense_is_refused(bad):
    with pytest.raises(ConfigError, match="Guard"):
        Guard(**bad)


def test_guarded_outputs_save_answers_that_bounded_activations_lose():
    """The reason for this method, on a trained network: same faults, same bounds, with and without the guard."""
    torch.manual_seed(0)
    net = train_classifier(digits_cnn(), digits("train", batch_size=64), epochs=8)
    where = fp.Parameters(include="fc2.weight")
    setup = {
        "data": digits(),
        "faults": fp.BitErrorRate([3e-4]),
        "format": fp.FixedPoint(),
        "where": where,
        "trials": 200,
    }
    open_, guarded = (
        fp.assess(fp.harden(net, Guard(outputs=outputs), data=digits("train")), **setup) for outputs in (False, True)
    )
    row = fp.compare(open=open_, guarded=guarded).iloc[1]
    assert row["paired"]
    assert row["accuracy_gain_low"] > 0.2
    assert guarded.golden["accuracy"] >= open_.golden["accuracy"] - 0.01
