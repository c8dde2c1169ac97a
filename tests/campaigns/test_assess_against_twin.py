from __future__ import annotations

import numpy as np
import pytest
import slow_twin as slow
import torch
from slow_twin import SlowTwin
from torch import nn

import flipproof as fp
from flipproof.faults import TrialGenerator

WEIGHTS = ("0.weight", "2.weight")
EVERYTHING = ("0.weight", "0.bias", "2.weight", "2.bias")


def same_as_twin(model, data, faults, codecs, *, trials=25, seed=3, **setup):
    """Run both and compare every record."""
    result = fp.assess(model, data=data, faults=faults, trials=trials, seed=seed, **setup)
    twin = SlowTwin(model, codecs)
    inputs, targets = [x for x, _ in data], [int(t) for _, y in data for t in y]
    golden, _ = twin.run(inputs, [])
    assert result.golden == {"accuracy": slow.accuracy(golden, targets)}
    assert result.bits == twin.bits
    space = fp.FaultSpace(model, format=setup.get("format"), where=setup.get("where"))
    points = faults.points()
    assert len(result.records) == sum(1 if p.repeats(space) else trials for p in points)
    for record in result.records:
        point = points[record.point]
        draw = point.draw(space, TrialGenerator(seed, repr(point), record.trial))
        places = [twin.place(position) for position in draw.positions.tolist()]
        outputs, changed = twin.run(inputs, places, draw.stuck)
        assert record.faults == len(places)
        assert record.flips == changed
        assert record.outcomes == slow.outcomes(golden, outputs)
        assert record.metrics == {"accuracy": slow.accuracy(outputs, targets)}
        assert record.digest == draw.digest
        assert record.where == (places if len(places) <= 16 else [])
    return result


@pytest.mark.parametrize(
    "faults",
    [
        fp.BitErrorRate([1e-3, 1e-2, 0.1]),
        fp.BitErrorRate(5e-3, exact=False),
        fp.BitErrorRate(5e-3, spread="layers"),
        fp.RandomBits([1, 2, 40]),
        fp.BitPosition(range(32)),
        fp.StuckAt([1e-2, 0.3], value=1),
        fp.StuckAt(1e-2, value=0),
    ],
    ids=repr,
)
def test_float32(mlp, blobs, faults):
    result = same_as_twin(mlp, blobs, faults, dict.fromkeys(EVERYTHING, slow.float32))
    assert result.trials["masked"].sum() < result.trials["samples"].sum()


@pytest.mark.parametrize(
    ("format", "codecs"),
    [
        (fp.Float16(), dict.fromkeys(EVERYTHING, slow.float16)),
        (fp.BFloat16(), dict.fromkeys(EVERYTHING, slow.bfloat16)),
        (fp.FixedPoint(), dict.fromkeys(EVERYTHING, slow.fixed_point(15, 16))),
        (fp.FixedPoint(2, 4), dict.fromkeys(EVERYTHING, slow.fixed_point(2, 4))),
        (fp.Affine(bits=4), dict.fromkeys(EVERYTHING, slow.float32) | dict.fromkeys(WEIGHTS, slow.affine(4))),
        (fp.Affine(), dict.fromkeys(EVERYTHING, slow.float32) | dict.fromkeys(WEIGHTS, slow.affine(8))),
        (
            {"0.weight": fp.Affine(bits=3), "2": fp.Float16(), "*.bias": fp.FixedPoint(3, 8)},
            {
                "0.weight": slow.affine(3),
                "2.weight": slow.float16,
                "2.bias": slow.float16,
                "0.bias": slow.fixed_point(3, 8),
            },
        ),
    ],
    ids=["float16", "bfloat16", "fixed", "narrow-fixed", "affine4", "affine8", "mapping"],
)
@pytest.mark.parametrize("faults", [fp.BitErrorRate([1e-2, 0.1]), fp.StuckAt(0.05)], ids=repr)
def test_other_formats(mlp, blobs, format, codecs, faults):
    same_as_twin(mlp, blobs, faults, codecs, format=format, trials=15)


def test_fortunes_view_is_the_weights_alone(mlp, blobs):
    codecs = dict.fromkeys(WEIGHTS, slow.affine(4))
    where = fp.Parameters(kinds=("weight",))
    same_as_twin(mlp, blobs, fp.BitErrorRate(0.05), codecs, format=fp.Affine(bits=4), where=where, trials=15)


def test_part_of_the_model(mlp, blobs):
    result = same_as_twin(
        mlp, blobs, fp.RandomBits(2), {"2.weight": slow.float32}, where=fp.Parameters(include="2", exclude="*.bias")
    )
    assert result.header.left_out.keys() == {"0.weight", "0.bias", "2.bias"}


def every_bit(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[tuple[str, int, int], tuple[float, dict]]:
    """Accuracy and outcomes of every possible single flip."""
    twin = SlowTwin(model, dict.fromkeys(dict(model.named_parameters()), slow.float32))
    golden, _ = twin.run([x], [])
    truth = {}
    for position in range(twin.bits):
        outputs, _ = twin.run([x], [twin.place(position)])
        truth[twin.place(position)] = (slow.accuracy(outputs, y.tolist()), slow.outcomes(golden, outputs))
    return truth


def test_every_single_bit_of_a_tiny_net():
    net = nn.Linear(2, 2)
    x = torch.randn(12, 2)
    y = net(x).argmax(dim=1)
    y[0] = 1 - y[0]
    truth = every_bit(net, x, y)
    assert len(truth) == 192
    result = fp.assess(net, data=[(x, y)], faults=fp.RandomBits(1), trials=2500)
    for record in result.records:
        assert (record.metrics["accuracy"], record.outcomes) == truth[record.where[0]]
    assert {record.where[0] for record in result.records} == set(truth)
    point = result.summary.iloc[0]
    accuracies = np.array([accuracy for accuracy, _ in truth.values()])
    standard_error = accuracies.std() / 2500**0.5
    assert abs(point["accuracy"] - accuracies.mean()) < 4 * standard_error
    for outcome in ("masked", "non_critical_sdc", "critical_sdc", "due"):
        shares = np.array([counts[outcome] / 12 for _, counts in truth.values()])
        assert abs(point[outcome] - shares.mean()) <= 4 * shares.std() / 2500**0.5


def test_nan_weights_make_every_sample_due_and_wrong():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(1.5)  # exponent 0111 1111: its top bit flipped gives NaN, the fraction not being 0
        net.bias.copy_(torch.tensor([0.0, 1.0]))
    data = [(torch.rand(5, 2), torch.tensor([1, 1, 0, 1, 1]))]
    where = fp.Parameters(include="weight")
    result = fp.assess(net, data=data, faults=fp.BitPosition(30), where=where, metrics=("accuracy", "auroc"))
    row = result.summary.iloc[0]
    assert result.golden["accuracy"] == 0.8
    assert (row["accuracy"], row["auroc"], row["due"], row["critical_total"]) == (0.0, 0.0, 1.0, 1.0)
    assert row["accuracy_drop"] == 0.8
