"""Neuron campaigns against a twin that hooks one fault into one forward and takes the one row it hit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import read_batches
from flipproof.running.decision import Decision
from flipproof.running.neurons import neuron_space
from flipproof.running.outcomes import classify
from flipproof.running.scales import OUTCOMES

Data = list[tuple[Tensor, Tensor]]


class Branches(nn.Module):
    """Residual, grouped and dilated convolutions, functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.bn(self.b(x)) + x)
        return self.fc(F.max_pool2d(x, 2).flatten(1))


class Untraceable(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.rnn = kind(3, 5, batch_first=batch_first)
        self.batch_first = batch_first
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(x if self.batch_first else x.transpose(0, 1))
        return self.out(steps[:, -1] if self.batch_first else steps[-1])


def images(*shape: int) -> Data:
    x = torch.randn(11, *shape)
    y = torch.arange(11) % 3
    return [(x[:6], y[:6]), (x[6:], y[6:])]


CASES = {
    "branches": (Branches, (2, 4, 4), None),
    "untraceable": (Untraceable, (2, 4, 4), None),
    "shared": (Shared, (6,), None),
    "lstm": (lambda: Recurrent(nn.LSTM, True), (4, 3), None),
    "gru, time first": (lambda: Recurrent(nn.GRU, False), (4, 3), None),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 6),
        None,
    ),
    "float16": (Branches, (2, 4, 4), fp.Float16()),
    "bfloat16": (Shared, (6,), fp.BFloat16()),
    "fixed": (Branches, (2, 4, 4), fp.FixedPoint(4, 11)),
    "affine": (Shared, (6,), fp.Affine(8)),
}


def twin(net: nn.Module, data: Data, fmt: fp.Float32 | None, seed: int, trial: int) -> dict[str, int]:
    """Outcome counts of a trial, one fault a forward, with hooks and formats of its own."""
    net.eval()
    batches = read_batches(data, torch.device("cpu"))
    space = neuron_space(net, batches, fp.Neurons(), fmt)
    point = fp.RandomBits(1)
    places = space.places(point.draw(space, TrialGenerator(seed, repr(point), trial)))
    counts = [0, 0, 0, 0]
    first = 0
    Decision.from_golden(torch.cat([_forward(net, space, x, None) for x, _ in data]))
    for x, y in data:
        golden = _forward(net, space, x, None)
        for row in range(len(y)):
            faulty = _forward(net, space, x, (row, *places[first + row]))
            outcome = classify(
                golden, faulty, Decision.from_golden(torch.cat([_forward(net, space, d, None) for d, _ in data])), y
            )
            assert all(int(outcome[other]) == 0 for other in range(len(y)) if other != row)
            counts[int(outcome[row])] += 1
        first += len(y)
    return dict(zip(OUTCOMES, counts, strict=True))


def _forward(net: nn.Module, space: object, x: Tensor, fault: tuple[int, str, int, int] | None) -> Tensor:
    handles, seen = [], {}
    sites = {site.name: site for site in space.sites}

    def hook_for(name: str):
        def hook(module, args, result):
            call = seen[name] = seen.get(name, -1) + 1
            site = sites[f"{name}[{call}]" if call else name]
            out = result[0] if isinstance(result, tuple) else result
            time_first = isinstance(module, nn.RNNBase) and not module.batch_first
            rows = out.transpose(0, 1) if time_first else out
            words = site.format.encode_values(rows.clone(memory_format=torch.contiguous_format), site.coding)
            if fault is not None and fault[1] == site.name:
                flat = words.reshape(words.shape[0], -1)
                word = int(flat[fault[0], fault[2]]) ^ (1 << fault[3])
                if flat.dtype != torch.uint8 and word >= 2 ** (flat.element_size() * 8 - 1):
                    word -= 2 ** (flat.element_size() * 8)
                if flat.dtype != torch.uint8 and word < -(2 ** (flat.element_size() * 8 - 1)):
                    word += 2 ** (flat.element_size() * 8)
                flat[fault[0], fault[2]] = word
            rows = site.format.decode_words(words, site.coding, rows.dtype)
            out = rows.transpose(0, 1) if time_first else rows
            return (out, *result[1:]) if isinstance(result, tuple) else out

        return hook

    for name, module in net.named_modules():
        if name in space.calls:
            handles.append(module.register_forward_hook(hook_for(name)))
    try:
        with torch.no_grad():
            return net(x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("case", CASES)
def test_campaign_equals_one_fault_a_forward(case):
    build, shape, fmt = CASES[case]
    net, data = build(), images(*shape)
    found = fp.assess(net, data=data, faults=fp.RandomBits(1), where=fp.Neurons(), format=fmt, trials=6, seed=3)
    for trial in range(6):
        assert found.records[trial].outcomes == twin(net, data, fmt, 3, trial)
    assert (found.trials["flips"] == 11).all()
    assert found.summary["critical_total"].between(0, 1).all()


def rows(assessment: fp.Assessment) -> list[dict[str, object]]:
    return [{**record.to_json(), "seconds": 0} for record in assessment.records]


def test_records_do_not_depend_on_workers_caches_or_order():
    net, data = Branches(), images(2, 4, 4)
    setup = {"data": data, "faults": fp.RandomBits(1), "where": fp.Neurons(), "trials": 12, "seed": 1}
    base = rows(fp.assess(net, **setup))
    assert rows(fp.assess(net, **setup, cache_bytes=0)) == base
    assert rows(fp.assess(net, **setup, workers=2)) == base
    assert len({record["digest"] for record in base}) == 12


def test_resumed_from_a_journal(tmp_path):
    net, data = Branches(), images(2, 4, 4)
    setup = {
        "data": data,
        "faults": fp.RandomBits(1),
        "where": fp.Neurons("fc"),
        "seed": 1,
        "journal": tmp_path / "j.jsonl",
    }
    fp.assess(net, **setup, trials=4)
    assert rows(fp.assess(net, **setup, trials=9)) == rows(fp.assess(net, **{**setup, "journal": None}, trials=9))


def test_a_bit_position_hits_that_bit_alone_and_the_model_comes_back_as_it_was():
    net, data = Branches().train(), images(2, 4, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = fp.assess(net, data=data, faults=fp.BitPosition([31, 30]), where=fp.Neurons("fc"), trials=5)
    assert len(found.trials) == 10
    assert {bit for record in found.records for _, _, bit in record.where} == {30, 31}
    assert all(record.where[0][0] == "fc" for record in found.records)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_last_layer_in_closed_form():
    """A sign flip in a linear classifier's output: the class follows from the logits alone."""
    net, data = nn.Linear(4, 3), images(4)
    found = fp.assess(net, data=data, faults=fp.BitPosition([31]), where=fp.Neurons(), trials=8)
    logits = torch.cat([net(x).detach() for x, _ in data])
    for record in found.records:
        flipped = logits.clone()
        for row, (_, neuron, _) in enumerate(record.where):
            flipped[row, neuron] *= -1
        expected = int((flipped.argmax(1) != logits.argmax(1)).sum())
        assert record.outcomes["critical_sdc"] == expected


@pytest.mark.parametrize("faults", [fp.BitErrorRate(1e-3), fp.RandomBits(2), fp.StuckAt(1e-3)])
def test_only_single_upsets(faults):
    with pytest.raises(fp.FlipproofError, match="single upset"):
        fp.assess(nn.Linear(4, 3), data=images(4), faults=faults, where=fp.Neurons())


def test_nothing_to_hit_is_an_error_that_names_the_layers():
    with pytest.raises(fp.FlipproofError, match="not selected"):
        fp.assess(nn.Sequential(nn.Linear(4, 3)), data=images(4), faults=fp.RandomBits(1), where=fp.Neurons("conv*"))
