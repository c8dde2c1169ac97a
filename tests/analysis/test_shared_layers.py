"""Layers that a forward calls twice: every layer keeps the cut behind it, and says what whole forwards say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.analysis.neuron_probes import NeuronProber
from flipproof.analysis.opened_model import opened


class Tied(nn.Module):
    """A convolution, a Linear called twice with a norm between, a head: one called layer must not slow the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.tanh(self.shared(torch.relu(self.shared(x)))))


class Whole(Tied):
    """The same, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


DATA = [(torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(n)), torch.arange(4) % 3) for n in (1, 2)]
FORMATS = [None, fp.Float16(), fp.Affine(8), {"shared": fp.Affine(4), "*": fp.Float32()}]


def pair() -> tuple[Tied, Whole]:
    tied, whole = Tied(), Whole()
    whole.load_state_dict(tied.state_dict())
    return tied, whole


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_cuts_say_what_whole_forwards_say_and_cost_less(format):
    """Affine has a range of its own for each call: calls are counted from the cut, not from the start."""
    quick, slow = (fp.analyze(net, DATA, fp.DeepVigor(factors="exhaustive", holes=0), format=format) for net in pair())
    assert list(quick.layers["layer"]) == ["conv", "shared", "shared[1]", "head"]
    for one, other in zip(quick.layers_found, slow.layers_found, strict=True):
        assert torch.equal(one.critical, other.critical)
        assert torch.equal(one.ranges, other.ranges)
    assert (quick.layers["forwards"] < slow.layers["forwards"]).all()
    made = {"conv": 8 * 9, "shared": 64, "shared[1]": 64, "head": 24}
    total, behind = sum(made.values()), [152, 88, 24, 0]
    for layer, rest in zip(quick.layers_found, behind, strict=True):
        assert layer.forwards == pytest.approx(layer.probes * rest / total)
    for layer in slow.layers_found:
        assert layer.forwards == layer.probes > 0


def test_every_call_has_a_cut():
    with opened(Tied(), DATA, fp.Neurons(), None, None, 2**28) as prober:
        assert isinstance(prober, NeuronProber)
        assert all(prober.cuts(site.name) for site in prober.sites)
        for site in prober.sites:
            assert prober.suffix(site.name, 0) is not None


def test_shared_weights_move_every_call():
    """A weight of a layer called twice is changed in memory: a cut behind one call would miss the other."""
    tied, whole = pair()
    exact = fp.DeepVigor(factors="exhaustive", ranges=False, neurons=2)
    where = fp.Parameters("shared")
    quick, slow = (fp.analyze(net, DATA, exact, where=where) for net in (tied, whole))
    for one, other in zip(quick.layers_found, slow.layers_found, strict=True):
        assert torch.equal(one.critical, other.critical)
    assert int(quick.layers_found[0].critical.sum()) > 0


class Felt(nn.Module):
    """Quantised to the range of the whole batch: a sample's answer depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        scale = x.abs().max() / 7
        return self.last((x / scale).round().clamp(-8, 7) * scale)


def test_samples_that_feel_each_other_have_a_forward_of_their_own():
    """One upset, one forward, the other samples golden: what the map says is what such forwards give."""
    net, data = Felt().eval(), [(torch.randn(6, 4), torch.zeros(6))]
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive", ranges=False), where=fp.Neurons("first"))
    x = data[0][0]
    truth = torch.zeros(6, 32, dtype=torch.int32)
    with torch.no_grad():
        golden = net(x).argmax(1)
        values = net.first(x)
        for sample in range(6):
            for neuron in range(6):
                for bit in range(32):

                    def hook(module, args, out, at=(sample, neuron), bit=bit):
                        words = out.view(torch.int32).clone()
                        words[at] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
                        return words.view(torch.float32)

                    handle = net.first.register_forward_hook(hook)
                    out = net(x)[sample]
                    handle.remove()
                    truth[neuron, bit] += int(bool(out.isnan().any()) or int(out.argmax()) != int(golden[sample]))
    assert values.shape == (6, 6)
    assert torch.equal(found.layers_found[0].critical, truth)


@torch.fx.wrap
def checked(x: Tensor) -> Tensor:
    """A check that tracing keeps as one step."""
    if bool((x.abs() > 1e6).any()):
        raise ValueError("out of range")
    return x


class Picky(nn.Module):
    """Refuses a batch that holds something huge, as an assertion in a forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if bool((x.abs() > 1e6).any()):
            raise ValueError("out of range")
        return self.last(torch.relu(x))


def test_a_model_that_raises_makes_that_flip_critical_and_no_other():
    net, data = Picky(), [(torch.randn(4, 4), torch.zeros(4))]
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive", ranges=False), where=fp.Neurons("first"))
    critical = found.layers_found[0].critical
    assert (critical[:, 30] == 4).all()  # the top bit of the exponent: beyond 1e6, or NaN
    assert (critical[:, 0] < 4).all()


@pytest.mark.parametrize("traceable", [False, True])
def test_weights_that_make_the_model_raise_are_critical_for_the_samples_it_raises_on(traceable):
    class Refusing(Picky):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(checked(torch.relu(self.first(x))))

    net, data = (Refusing if traceable else Picky)(), [(torch.randn(4, 4), torch.zeros(4))]
    before = net.first.weight.clone()
    exact = fp.DeepVigor(factors="exhaustive", ranges=False, neurons=2)
    found = fp.analyze(net, data, exact, where=fp.Parameters("first.weight"))
    layer = found.layers_found[0]
    truth = torch.zeros(2, 32, dtype=torch.int32)
    with torch.no_grad():
        golden = net(data[0][0]).argmax(1)
        words = net.first.weight.data.view(torch.int32).view(-1)
        for row, place in enumerate(layer.neurons.tolist()):
            for bit in range(32):
                mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
                words[place] ^= mask
                for sample in range(4):
                    try:
                        out = net(data[0][0][sample : sample + 1])
                        wrong = bool(out.isnan().any()) or int(out.argmax()) != int(golden[sample])
                    except ValueError:
                        wrong = True
                    truth[row, bit] += int(wrong)
                words[place] ^= mask
    assert torch.equal(layer.critical, truth)
    assert int(truth[:, 30].sum()) > 0
    assert torch.equal(net.first.weight, before)


def test_weights_of_a_model_whose_samples_feel_each_other_are_changed_for_the_whole_batch():
    net, x = Felt().eval(), torch.randn(6, 4)
    exact = fp.DeepVigor(factors="exhaustive", ranges=False)
    found = fp.analyze(net, [(x, torch.zeros(6))], exact, where=fp.Parameters("first.weight"))
    truth = torch.zeros(24, 32, dtype=torch.int32)
    with torch.no_grad():
        golden = net(x).argmax(1)
        words = net.first.weight.data.view(torch.int32).view(-1)
        for place in range(24):
            for bit in range(32):
                mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
                words[place] ^= mask
                out = net(x)
                words[place] ^= mask
                truth[place, bit] = int((out.isnan().any(1) | (out.argmax(1) != golden)).sum())
    assert torch.equal(found.layers_found[0].critical, truth)


class TimeFirst(nn.Module):
    """Its inputs count time first, and time is as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(2, 1), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0][-1])


def test_weights_of_a_time_first_model_are_those_of_flips_in_memory():
    net, x = TimeFirst().eval(), torch.randn(4, 4, 2)
    exact = fp.DeepVigor(factors="exhaustive", ranges=False)
    found = fp.analyze(net, [(x, torch.zeros(4))], exact, where=fp.Parameters("rnn.weight_ih_l0"))
    truth = torch.zeros(6, 32, dtype=torch.int32)
    with torch.no_grad():
        golden = net(x).argmax(1)
        words = net.rnn.weight_ih_l0.data.view(torch.int32).view(-1)
        for place in range(6):
            for bit in range(32):
                mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
                words[place] ^= mask
                out = net(x)
                words[place] ^= mask
                truth[place, bit] = int((out.isnan().any(1) | (out.argmax(1) != golden)).sum())
    assert torch.equal(found.layers_found[0].critical, truth)
