"""Rule 1: trial k alone is trial k after any others, and the model is given back as it came."""

from __future__ import annotations

import copy
import os
import random
import warnings
from argparse import Namespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import zoo
from torch import nn

import flipproof as fp
from flipproof.errors import AuditError, FlipproofWarning, ModelError
from flipproof.formats.base import bit_pattern
from flipproof.running.snapshots import Snapshot

FAULTS = fp.RandomBits(2)


pytestmark = pytest.mark.usefixtures("one_thread")


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: bit_pattern(t.detach()).clone() if t.is_floating_point() else t.clone() for name, t in named}


def plain(model: nn.Module) -> dict[str, str]:
    kept = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") or key == "_non_persistent_buffers_set":
                kept[f"{name}.{key}"] = repr(value)
    return kept


def on_fresh_copies(build: type[nn.Module], trials: int) -> list[list[int]]:
    """Outcomes of every trial and batch, each on a copy of its own: no code of a campaign is shared but the draw."""
    model = build()
    space = fp.FaultSpace(model)
    campaign = fp.assess(model, data=zoo.batches(), faults=FAULTS, trials=trials, audit=0, cache_bytes=0)
    draws = [r.where for r in campaign.records]
    golden, outcomes = [], []
    pristine = build()
    pristine.eval()

    def answer(where, x):
        fresh = copy.deepcopy(pristine)
        if build is zoo.Containers:
            zoo.Containers.calls = 0
        pin()
        with torch.no_grad():
            for name, value, bit in where:
                words = fresh.get_parameter(name).data.view(torch.int32).view(-1)
                words[value] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            return fresh(x)

    del space
    golden = [answer([], x) for x, _ in zoo.batches()]
    for where in draws:
        row = []
        for (x, _), expected in zip(zoo.batches(), golden, strict=True):
            found = answer(where, x)
            nan = found.isnan().any(dim=1)
            same = (bit_pattern(found) == bit_pattern(expected)).all(dim=1) & ~nan
            critical = (found.argmax(dim=1) != expected.argmax(dim=1)) & ~nan & ~same
            row += torch.where(nan, 3, torch.where(same, 0, torch.where(critical, 2, 1))).tolist()
        outcomes.append([row.count(k) for k in range(4)])
    return outcomes


def pin() -> None:
    """The random numbers of a campaign with seed 0."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def outcomes_of(result: fp.Assessment) -> list[list[int]]:
    return result.trials[["masked", "non_critical_sdc", "critical_sdc", "due"]].to_numpy().tolist()


@pytest.mark.parametrize("build", zoo.STATEFUL)
def test_a_thousand_trials_equal_fresh_copies(build):
    trials = int(os.environ.get("TRIALS", 1000 if build is zoo.MaxNorm else 80))
    found = fp.assess(build(), data=zoo.batches(), faults=FAULTS, trials=trials)
    expected = on_fresh_copies(build, trials)
    assert outcomes_of(found) == expected
    assert any(row[0] != sum(row) for row in expected)


@pytest.mark.parametrize("build", zoo.STATEFUL)
def test_any_order_any_number_of_workers_any_start(build):
    setup = {"data": zoo.batches(), "faults": FAULTS, "seed": 3}
    alone = fp.assess(build(), **setup, trials=40).trials.drop(columns="seconds")
    pair = fp.assess(build(), **setup, trials=40, workers=2).trials.drop(columns="seconds")
    assert pair.equals(alone)
    used = build()
    fp.assess(used, data=zoo.batches(), faults=fp.RandomBits(9), trials=30)
    assert fp.assess(used, **setup, trials=40).trials.drop(columns="seconds").equals(alone)


@pytest.mark.parametrize("build", zoo.STATEFUL)
@pytest.mark.parametrize("where", [None, fp.Neurons()], ids=repr)
def test_the_model_and_the_random_numbers_are_given_back(build, where):
    if where is not None and build is zoo.MaxNorm:
        where = fp.Neurons("head")
    model = build()
    model.train()
    before, attributes, calls = bits(model), plain(model), getattr(build, "calls", None)
    torch.manual_seed(11)
    random.seed(11)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(11)
    random.seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipproofWarning)  # of batches whose rows depend on each other
        fp.assess(model, data=zoo.batches(), faults=fp.RandomBits(1), where=where, trials=6)
    assert (torch.rand(1).item(), random.random()) == expected
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert plain(model) == attributes
    assert getattr(build, "calls", None) == calls


def test_an_observer_that_was_left_on_no_longer_spoils_later_trials():
    found = fp.assess(zoo.Observed(), data=zoo.batches(), faults=fp.RandomBits(1), trials=400)
    early, late = found.trials["masked"][:200].mean(), found.trials["masked"][200:].mean()
    assert abs(early - late) < 1.5  # of 10 samples; with state it fell from most to none


def test_what_cannot_be_put_back_is_refused_by_name():
    class Stream(zoo.Net):
        def __init__(self):
            super().__init__()
            self.stream = (i for i in range(10**9))

        def forward(self, x):
            return super().forward(x) + next(self.stream)

    with pytest.raises(ModelError, match=r"stream is a generator.*cannot be put back"):
        fp.assess(Stream(), data=zoo.batches(), faults=FAULTS, trials=2)

    steps = 0

    class Hidden(zoo.Net):
        def forward(self, x):
            nonlocal steps
            steps += 1
            return super().forward(x) + steps

    with pytest.raises(ModelError, match="keeps state between calls where it cannot be put back"):
        fp.assess(Hidden(), data=zoo.batches(), faults=FAULTS, trials=2)


def test_a_write_that_no_counter_sees_is_found_by_the_audit_and_watched_after_it(tmp_path):
    class Silent(zoo.Net):
        """Writes through .data, and only when a fault made something large."""

        def __init__(self):
            super().__init__()
            self.register_buffer("worst", torch.zeros(1))

        def forward(self, x):
            h = torch.relu(self.a(x))
            if float(h.nan_to_num(1e9).max()) > 40:
                self.worst.data += 1
            return self.b(h) + self.worst * torch.tensor([0.0, 5.0, 0.0])

    setup = {"data": zoo.batches(), "faults": fp.RandomBits(4), "trials": 60, "journal": tmp_path / "j.jsonl"}
    model = Silent()
    with pytest.raises(AuditError, match=r"wrote to worst where no version counter sees it") as caught:
        fp.assess(model, **setup)
    assert caught.value.shortcut == "versions"
    assert torch.equal(model.worst, torch.zeros(1))
    resumed = fp.assess(model, **setup)

    class Loud(Silent):
        """The same, where the counter sees it."""

        def forward(self, x):
            h = torch.relu(self.a(x))
            if float(h.nan_to_num(1e9).max()) > 40:
                self.worst += 1
            return self.b(h) + self.worst * torch.tensor([0.0, 5.0, 0.0])

    assert outcomes_of(resumed) == outcomes_of(fp.assess(Loud(), **{**setup, "journal": None}))
    assert len(resumed.trials) == 60


def test_a_snapshot_of_every_kind_of_value():
    model = zoo.Containers()
    snapshot = Snapshot(model)
    before = {k: copy.deepcopy(v) for k, v in vars(model).items() if k in ("seen", "table", "marks", "last")}
    assert not snapshot.changed()
    assert snapshot.restore() == []
    with torch.no_grad():
        model(torch.randn(3, zoo.FEATURES))
    model.extra, model.a.bias.data = 3, torch.ones(5)
    del model.b.weight
    model.register_buffer("late", torch.ones(2))
    assert snapshot.changed()
    back = snapshot.restore()
    assert not snapshot.changed()
    assert {"seen", "table.inner.worst", "marks", "last", "array", "slotted", "plain.worst", "Containers"} <= set(back)
    assert {"extra", "a.bias", "b.weight", "late"} <= set(back)
    assert before == {k: v for k, v in vars(model).items() if k in before}
    fresh = zoo.Containers()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


PEAK = [0.0]


def peak_of(h, kept=PEAK):
    kept[0] = max(kept[0], float(h.nan_to_num(1e9).abs().max()))
    return kept[0]


def closed():
    peak = 0.0

    def latch(h):
        nonlocal peak
        peak = max(peak, float(h.nan_to_num(1e9).abs().max()))
        return peak

    return latch


class Outside(zoo.Net):
    """Divides by the largest value that was ever seen, and keeps that where no snapshot reaches."""

    def __init__(self, where):
        super().__init__()
        self.where, self.latch = where, closed()
        PEAK[0] = 0.0

    def forward(self, x):
        h = torch.relu(self.a(x))
        peak = peak_of(h) if self.where == "a default argument" else self.latch(h)
        return self.b(h / peak if peak > 60 else h)


@pytest.mark.parametrize("where", ["a closure", "a default argument"])
@pytest.mark.parametrize("workers", [1, 2])
def test_state_that_nobody_can_put_back_stops_the_campaign(where, workers):
    with pytest.raises(AuditError, match="no longer gives its fault-free answers") as caught:
        fp.assess(Outside(where), zoo.batches(), faults=FAULTS, trials=300, workers=workers)
    assert caught.value.shortcut == "state"


def test_a_hook_that_keeps_state_is_not_blamed_on_a_shortcut():
    model, latch = zoo.Net(), closed()

    def hook(module, args, result):
        peak = latch(result)
        return result / peak if peak > 60 else result

    model.a.register_forward_hook(hook)
    with pytest.raises(AuditError) as caught:
        fp.assess(model, zoo.batches(), faults=FAULTS, trials=300)
    assert caught.value.shortcut == "state"


class Helper:
    """A helper object of the user's own: its class keeps the state."""

    peaks: ClassVar = {"peak": [0.0]}


class Holding(zoo.Net):
    array = np.zeros(1)

    def __init__(self):
        super().__init__()
        self.helper, self.config = Helper(), Namespace(peak=0.0)

    def forward(self, x):
        h = torch.relu(self.a(x))
        largest = float(h.nan_to_num(1e9).abs().max())
        type(self.helper).peaks["peak"][0] = max(type(self.helper).peaks["peak"][0], largest)
        type(self).array[0] = max(type(self).array[0], largest)
        self.config.peak = max(self.config.peak, largest)
        tripped = self.config.peak > 60 or Helper.peaks["peak"][0] > 60 or type(self).array[0] > 60
        return self.b(h * 0 if tripped else h)


def test_what_classes_of_helpers_and_records_hold_is_put_back():
    found = fp.assess(Holding(), zoo.batches(), faults=FAULTS, trials=200)
    assert outcomes_of(found) == outcomes_of(fp.assess(zoo.Latch60(), zoo.batches(), faults=FAULTS, trials=200))
    assert Helper.peaks == {"peak": [0.0]}
