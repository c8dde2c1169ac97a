"""Bad input gets a clear error and changes nothing."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.errors import ConfigError, DataError, FaultModelError, FaultSpaceError, MetricError, ModelError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


@pytest.fixture
def refused(tmp_path):
    """Runs `assess`, expects an error, and checks that model, data and disk are as before."""

    def run(kind, message, model=None, **change):
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) if model is None else model
        model.train()
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        x = X.clone()
        setup = {"data": [(X, Y)], "faults": fp.RandomBits(1), "trials": 2, "journal": tmp_path / "journal.jsonl"}
        with pytest.raises(kind, match=message) as error:
            fp.assess(model, **{**setup, **change})
        assert isinstance(error.value, fp.FlipproofError)
        assert all(module.training for module in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        after = model.state_dict()
        assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
        assert torch.equal(X, x)
        assert list(tmp_path.iterdir()) == []

    return run


class TestFaults:
    @pytest.mark.parametrize("ber", [-1e-9, 1.0001, float("nan"), float("inf"), "1e-3", None, True])
    def test_rates_outside_zero_to_one(self, ber):
        with pytest.raises(FaultModelError, match=rf"ber must be a rate in \[0, 1\], got {re.escape(repr(ber))}"):
            fp.BitErrorRate([1e-3, ber])

    def test_no_matching_parameter_lists_those_there_are(self, refused):
        message = (
            r"(?s)no parameter is left to hit with .*include=\('head\*',\).*0\.weight \(weight\)\n  0\.bias \(bias\)"
        )
        refused(FaultSpaceError, message, where=fp.Parameters(include="head*"))

    def test_a_model_without_parameters(self, refused):
        refused(FaultSpaceError, "(?s)no parameter is left.*none at all", model=nn.Sequential(nn.ReLU()))

    def test_parameters_that_no_format_stores(self, refused):
        model = nn.Linear(4, 3)
        model.table = nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False)
        refused(FaultSpaceError, "table: is torch.bool, which has no Format", model=model)

    def test_more_bits_than_there_are(self, refused):
        refused(FaultModelError, "the fault space has only 1,376 bits", faults=fp.RandomBits(1377))

    def test_a_bit_that_no_value_has(self, refused):
        refused(FaultModelError, "bits 0 to 31", faults=fp.BitPosition(32))

    def test_a_number_instead_of_a_fault_model(self, refused):
        refused(FaultModelError, "takes a fault model such as fp.BitErrorRate.*got 0.001", faults=1e-3)

    def test_weights_that_the_format_cannot_hold(self, refused):
        model = nn.Linear(4, 3)
        with torch.no_grad():
            model.weight[1, 1] = 7e4
        refused(fp.FlipproofError, "weight: 1 finite values become NaN or infinite", model=model, format=fp.Float16())


class TestData:
    @pytest.mark.parametrize("data", [[], iter([]), [(X[:0], Y[:0])]], ids=["empty", "exhausted", "no-samples"])
    def test_no_samples(self, refused, data):
        refused(DataError, "holds no samples.*not exhausted", data=data)

    def test_a_generator_used_up_by_an_earlier_campaign(self, refused):
        batches = ((x, y) for x, y in [(X, Y)])
        fp.assess(nn.Linear(4, 3), data=batches, faults=fp.RandomBits(1), trials=1)
        refused(DataError, "not exhausted", data=batches)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ((X, Y), r"one \(inputs, targets\) pair.*pass \[\(inputs, targets\)\]"),
            ([X, Y], r"batch 0: expected a pair .* got a torch.float32 tensor of shape \(6, 4\)"),
            ([(X, Y), (X, Y, Y)], r"batch 1: expected a pair .* got a tuple of 3"),
            ([{"x": X, "y": Y}], r"batch 0: expected a pair .* got a dict with the keys \['x', 'y'\]"),
            (None, "takes an iterable of .* got a NoneType"),
            ([(X, torch.ones(6, 4).long())], "no positive labels in 6 rows; if the model .* say task=fp.MultiLabel"),
            ([(X, torch.zeros(6, 8, 8).long())], r"\(samples, 1\), got \(6, 8, 8\). If they are something else, say"),
            ([(X, [{"boxes": X, "labels": Y}] * 6)], "a box ends before it begins"),
            ([(X, F.one_hot(Y))], r"one class a sample, .*got \(6, 3\); one-hot targets go through .argmax\(dim=1\)"),
            ([(X, Y + 0.5)], r"whole class numbers, got torch.float32 with \[0.5, 1.5"),
            ([(X, torch.full((6,), float("nan")))], "whole class numbers"),
            ([(X, ["cat"] * 6)], "batch 0: targets must be class numbers, got a list of 6"),
            ([(X, None)], "batch 0: targets must be class numbers, got a NoneType"),
            ([(X, Y[:5])], r"batch 0 has 5 targets but the model's output has the shape \(6, 3\)"),
            (
                [(X, Y), (X[:, :3], Y)],
                r"rejects batch 1 \(inputs: torch.float32 \(6, 3\)\): RuntimeError: .*mat1 and mat2",
            ),
            ([((X, X), Y)], r"rejects batch 0 .*TypeError"),
            ([({"image": X}, Y)], r"rejects batch 0 .*TypeError.*image"),
            ([(X, Y + 1)], r"sample 2 has the label 3, but the model answers classes 0 to 2 \(2 such samples\)"),
            ([(X, Y - 1)], "sample 0 has the label -1"),
            ([((X, lambda: 0), Y)], "rejects batch 0"),
        ],
    )
    def test_batches_that_cannot_be_used(self, refused, data, message):
        refused(DataError, message, data=data)

    @pytest.mark.parametrize("targets", [Y.float(), Y.int(), Y.reshape(-1, 1), Y.tolist(), np.asarray(Y)], ids=type)
    def test_every_usual_way_to_write_classes_is_fine(self, targets):
        net = nn.Linear(4, 3)
        result = fp.assess(net, data=[(X, targets)], faults=fp.RandomBits(1), trials=1)
        assert result.golden == fp.assess(net, data=[(X, Y)], faults=fp.RandomBits(1), trials=1).golden


class Returning(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(4, 3), make

    def forward(self, x):
        return self.make(self.linear(x))


def each_its_own(h):
    """As detection models answer: a list with a dict a sample."""
    return [{"scores": row} for row in h]


class TestOutputs:
    @pytest.mark.parametrize(
        ("make", "output", "message"),
        [
            (lambda h: (h, h), None, r"got a tuple of 2: .*pass output= a tuple index"),
            (lambda h: {"logits": h}, None, r"a dict with the keys \['logits'\]; pass output="),
            (lambda h: {"logits": h}, "scores", r"output='scores' does not fit .*\['logits'\]"),
            (lambda h: (h,), 1, "output=1 does not fit what the model returns, a tuple of 1"),
            (each_its_own, None, r"got a list of 6: a dict .*, …; pass output= a function that makes one row"),
            (each_its_own, lambda found: found[9], r"output= raises IndexError: list index .* a list of 6"),
            (
                each_its_own,
                lambda found: found[0]["boxes"],
                "output= raises KeyError: 'boxes' on what the .* a list of 6",
            ),
            (lambda h: h.argmax(dim=1), None, "one floating-point tensor to judge, got a torch.int64 tensor"),
            (lambda h: h.sum(), None, r"output has the shape \(\); the first"),
            (lambda h: h.reshape(-1), None, r"6 targets but the model's output has the shape \(18,\)"),
            (lambda h: h[:, :, None].expand(6, 3, 2), None, r"\(samples, classes\), got \(6, 3, 2\)"),
        ],
    )
    def test_outputs_that_cannot_be_judged(self, refused, make, output, message):
        refused(DataError, message, model=Returning(make), output=output)

    def test_batches_with_different_classes(self, refused):
        model = Returning(lambda h: h[:, : len(h) // 2])
        refused(DataError, r"\(2,\) in batch 1 but \(3,\) before", model=model, data=[(X, Y), (X[:4], Y[:4] % 2)])


class TestModels:
    def test_nan_without_faults_names_the_first_layer(self, refused):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 3))
        with torch.no_grad():
            model[1][1].weight[0, 0] = float("nan")
        refused(ModelError, r"NaN on batch 0; the first layer to do so is 1\.1 \(Linear\)", model=model)

    def test_nan_that_comes_with_the_data(self, refused):
        x = X.clone()
        x[2, 2] = float("nan")
        refused(ModelError, "NaN on batch 1; its inputs already hold NaN", data=[(X, Y), (x, Y)])

    def test_nan_that_arises_between_layers(self, refused):
        refused(ModelError, "outside any submodule", model=Returning(lambda h: h.abs().neg().sqrt()))

    def test_dropout_that_is_always_on(self, refused):
        model = Returning(lambda h: F.dropout(h, 0.5, training=True))
        setup = {"data": [(X, Y)], "faults": fp.RandomBits(1), "trials": 9}
        with torch.random.fork_rng(devices=[]):
            found = [fp.assess(model, **setup, seed=seed).trials["masked"].tolist() for seed in (0, 0, 1)]
        assert found[0] == found[1]  # every batch draws the same numbers in every run
        assert found[0] != found[2]

    def test_random_numbers_that_cannot_be_pinned(self, refused):
        model = Returning(lambda h: h + int.from_bytes(os.urandom(2), "little"))
        refused(ModelError, "two fault-free runs of batch 0 differ.*random in eval mode", model=model)

    def test_a_model_that_remembers(self, refused):
        calls = []
        model = Returning(lambda h: h + len(calls) * (calls.append(1) is None))
        refused(ModelError, "keeps state between calls", model=model)

    @pytest.mark.parametrize("model", ["resnet18", {"weight": X}, lambda x: x])
    def test_what_is_no_module(self, model):
        with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module first, got"):
            fp.assess(model, data=[(X, Y)], faults=fp.RandomBits(1))


class TestMetricsAndNumbers:
    def test_auroc_of_one_class(self, refused):
        refused(MetricError, "auroc is undefined: 6 of 6 targets are of class 0", data=[(X, Y * 0)], metrics="auroc")

    def test_unknown_metric(self, refused):
        refused(MetricError, "unknown metric 'f2': choose among", metrics=("accuracy", "f2"))
        refused(MetricError, "the task 'classification' has no metric 'f1'", metrics=("accuracy", "f1"))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_metric_that_is_no_number_without_faults(self, refused, value):
        refused(DataError, f"the metric mine is {value} on the golden run", metrics={"mine": lambda o, t: value})

    @pytest.mark.parametrize(
        "change", [{"trials": 0}, {"seed": -1}, {"confidence": 1.0}, {"margin": 0}, {"workers": 0}]
    )
    def test_numbers_out_of_range(self, refused, change):
        ((name, value),) = change.items()
        refused(ConfigError, rf"assess needs .*{name}={value}", **change)


class TestOtherArguments:
    @pytest.mark.parametrize("name", ["margin", "confidence"])
    @pytest.mark.parametrize("value", ["0.9", [0.9], True, 1j])
    def test_shares_that_are_no_numbers(self, refused, name, value):
        refused(ConfigError, f"a number between 0 and 1 for {name}=, got {re.escape(repr(value))}", **{name: value})

    def test_a_confidence_of_none(self, refused):
        refused(ConfigError, "a number between 0 and 1 for confidence=, got None", confidence=None)

    @pytest.mark.parametrize("value", ["1GB", 1e9, True])
    def test_bytes_that_are_no_whole_number(self, refused, value):
        refused(ConfigError, f"a whole number for cache_bytes=, got {value!r}", cache_bytes=value)

    def test_fewer_bytes_than_none(self, refused):
        refused(ConfigError, "0 .no cache. or more bytes for cache_bytes=, got -1", cache_bytes=-1)

    @pytest.mark.parametrize("value", ["gpu", "cuda:99", 1.5, ""])
    def test_a_device_that_is_not_here(self, refused, value):
        refused(ConfigError, f"takes a device that is here, such as 'cpu' or 'cuda:0', got {value!r}: ", device=value)

    @pytest.mark.parametrize("value", [5, True, ["a"]])
    def test_a_journal_that_is_no_path(self, refused, value):
        refused(ConfigError, f"the path of a journal for journal=, got {re.escape(repr(value))}", journal=value)


@pytest.mark.parametrize("bad", [{"trials": 2.5}, {"trials": "9"}, {"workers": 1.0}, {"seed": None}, {"trials": True}])
def test_counts_that_are_no_whole_numbers_write_nothing(tmp_path, bad):
    ((name, value),) = bad.items()
    with pytest.raises(fp.FlipproofError, match=f"whole number for {name}=, got {value!r}"):
        fp.assess(nn.Linear(4, 3), data=[(X, Y)], faults=fp.RandomBits(1), journal=tmp_path / "j.jsonl", **bad)
    assert list(tmp_path.iterdir()) == []
