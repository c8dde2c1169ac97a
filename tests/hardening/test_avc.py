import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.hardening.bounds.bounded import ClampInput, Saturate
from flipproof.hardening.harden import harden
from flipproof.hardening.report import hardening_report
from flipproof.models import stage_conv_72
from flipproof.testing import HardeningContract


class TestAVC(HardeningContract):
    method = fp.AVC()


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(4, 6, **options)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.rnn(x)[0][-1]))


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 40, 4, generator=generator), torch.arange(40) % 2)]


def test_bounds_are_the_extremes_of_every_gates_input(fitted_on):
    torch.manual_seed(0)
    net = Recurrent()
    data = sequences()
    safe = harden(net, fp.AVC(slack=1.0), data=data)
    data = fitted_on(net, data, fp.AVC())  # sequence first: samples are cut out of the second dimension
    h, c = torch.zeros(30, 6), torch.zeros(30, 6)
    inputs = []
    with torch.no_grad():
        for x in data[0][0]:
            a = F.linear(x, net.rnn.weight_ih_l0, net.rnn.bias_ih_l0) + F.linear(
                h, net.rnn.weight_hh_l0, net.rnn.bias_hh_l0
            )
            i, f, g, o = a.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            inputs.append((i, f, g, o, c))
    for k, gate in enumerate(("input_gate", "forget_gate", "candidate", "output_gate", "cell")):
        bound = safe.get_submodule(f"rnn.{gate}_l0")
        seen = torch.stack([step[k] for step in inputs])
        assert isinstance(bound, ClampInput)
        assert float(bound.low) == pytest.approx(float(seen.min()), abs=1e-6)
        assert float(bound.threshold) == pytest.approx(float(seen.max()), abs=1e-6)
    report = hardening_report(safe)
    assert len(report.sites) == 6
    assert report.unreachable == ()
    assert report.thresholds == 12
    with torch.no_grad():
        assert torch.allclose(safe(data[0][0]), net(data[0][0]), atol=1e-5)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 5), (nn.GRU, 3), (nn.RNN, 1)])
def test_no_due_is_left_and_the_model_is_untouched(kind, gates):
    torch.manual_seed(0)
    net = Recurrent(kind, num_layers=2)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)  # from 1 to 2 lie the weights that bit 30 turns into ∞ and NaN
    data = sequences()
    safe = harden(net, fp.AVC(), data=data)
    assert type(net.rnn) is kind
    assert len(hardening_report(safe).sites) == 2 * gates + 1
    labels = net(data[0][0]).argmax(dim=1)
    data = [(data[0][0], labels)]
    faults = fp.BitPosition(30, share=0.5)
    setup = {"data": data, "faults": faults, "trials": 40, "where": fp.Parameters("rnn")}
    plain, clipped = fp.assess(net, **setup), fp.assess(safe, **setup)
    assert clipped.trials["due"].sum() == 0
    assert plain.trials["due"].sum() > 0


def test_stagenet_gates_convolution_and_risk_are_all_clamped():
    torch.manual_seed(0)
    net = stage_conv_72(input_size=4).eval()
    x = torch.randn(20, 6, 4)
    at = torch.zeros(20, 6, dtype=torch.bool)
    at[:, -1] = True
    with torch.no_grad():
        labels = (net(x, at=at) > net(x, at=at).median()).long()
    data = [({"x": x, "at": at}, labels)]
    safe = fp.harden(net, fp.AVC(), data=data)
    names = {site.name.split(":")[0] for site in hardening_report(safe).sites}
    assert names == {
        *("forget_gate", "input_gate", "output_gate", "candidate", "cell"),
        *("theme_relu", "theme_gate", "risk"),
    }
    assert isinstance(safe.theme_relu, Saturate)
    found = fp.assess(safe, data=data, faults=fp.BitErrorRate(1e-2), trials=20)
    assert found.trials["due"].sum() == 0


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = Recurrent(nn.GRU, bidirectional=False)
    safe = fp.harden(net, fp.AVC(), data=sequences())
    again = fp.load_hardened(net, fp.save_hardened(safe, tmp_path / "safe.safetensors"))
    x = sequences(1)[0][0] * 5
    with torch.no_grad():
        assert torch.equal(again(x), safe(x))
    assert hardening_report(again).sites == hardening_report(safe).sites


def test_other_methods_say_that_gates_stay_closed():
    with pytest.warns(fp.FlipproofWarning, match="LSTM computes its gates in one kernel"):
        fp.harden(Recurrent(), fp.Ranger(), data=sequences())
