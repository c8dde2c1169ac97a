import math

import pytest
import torch

import flipproof as fp
from flipproof.models import stage_72, stage_384, stage_conv_72, stage_conv_384
from flipproof.models.stagenet import StageNet


@pytest.mark.parametrize(
    ("build", "lstm", "conv", "fc"),
    [
        (stage_conv_384, 738_618, 442_368, 24_960),
        (stage_conv_72, 48_764, 51_840, 1_800),
        (stage_384, 738_618, 0, 384),
        (stage_72, 48_764, 0, 72),
    ],
)
def test_weights_are_those_of_table_1(build, lstm, conv, fc):
    net = build()
    assert net.weight_counts() == {"lstm": lstm, "conv": conv, "fc": fc}
    assert sum(p.numel() for p in net.parameters() if p.dim() > 1) == lstm + conv + fc


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(xs):
    top = max(xs)
    e = [math.exp(x - top) for x in xs]
    return [x / sum(e) for x in e]


def cumsum(xs):
    return [sum(xs[: i + 1]) for i in range(len(xs))]


def linear(layer, xs):
    return [
        sum(w * x for w, x in zip(row, xs, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def twin(net, x, delta):
    """One sequence, step by step, in plain Python: as Gao et al. 2020 have it in words."""
    H, L = net.hidden, net.levels
    C = H // L
    h, c = [0.0] * H, [[0.0] * C for _ in range(L)]
    K = net.kernel_size or 1
    past_h, past_d = [[0.0] * H for _ in range(K)], [0.0] * K
    out = []
    for step, d in zip(x, delta, strict=True):
        a = [p + q for p, q in zip(linear(net.kernel, [*step, d]), linear(net.recurrent, [*h, d]), strict=True)]
        fm = cumsum(softmax(a[:L]))
        im = cumsum(softmax(a[L : 2 * L][::-1]))[::-1]
        rows = [a[2 * L + r * C : 2 * L + (r + 1) * C] for r in range(4 * L)]
        f, i, o = ([[sigmoid(v) for v in row] for row in rows[k * L : (k + 1) * L]] for k in range(3))
        g = [[math.tanh(v) for v in row] for row in rows[3 * L :]]
        for r in range(L):
            w = fm[r] * im[r]
            for k in range(C):
                c[r][k] = w * (f[r][k] * c[r][k] + i[r][k] * g[r][k]) + (fm[r] - w) * c[r][k] + (im[r] - w) * g[r][k]
        h = [o[r][k] * math.tanh(c[r][k]) for r in range(L) for k in range(C)]
        past_h, past_d = [*past_h[1:], h], [*past_d[1:], 1 - sum(fm) / L]
        rest = h
        if net.conv is not None:
            s = softmax(cumsum(past_d))
            z = [[past_h[k][n] * s[k] for k in range(K)] for n in range(H)]
            inner = [max(0.0, v) for v in linear(net.theme1, [sum(row) / K for row in z])]
            u = [sigmoid(v) for v in linear(net.theme2, inner)]
            conv = [
                sum(net.conv.weight[n, m, k].item() * z[m][k] for m in range(H) for k in range(K))
                + net.conv.bias[n].item()
                for n in range(H)
            ]
            rest = [hh + uu * vv for hh, uu, vv in zip(h, u, conv, strict=True)]
        out.append(sigmoid(linear(net.output, rest)[0]))
    return out


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_equals_a_step_by_step_twin(kernel):
    torch.manual_seed(0)
    net = StageNet(6, 3, kernel, 2, input_size=4).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x, delta = torch.randn(2, 7, 4).double(), torch.rand(2, 7).double() * 3
    with torch.no_grad():
        found = net(x, delta)
        for row in range(2):
            assert found[row].tolist() == pytest.approx(twin(net, x[row].tolist(), delta[row].tolist()), abs=1e-12)
        assert torch.equal(net(x), net(x, torch.ones(2, 7)))


def test_padding_cannot_change_a_real_step_and_risks_there_are_zero():
    torch.manual_seed(0)
    net = stage_conv_72(input_size=5).eval()
    x = torch.randn(3, 9, 5)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).float()
    wild = torch.where(mask[..., None] > 0, x, torch.full_like(x, 1e3))
    with torch.no_grad():
        whole = net(wild, mask=mask)
        for row, length in enumerate((9, 4, 1)):
            alone = net(x[row : row + 1, :length])
            assert torch.allclose(whole[row, :length], alone[0], atol=1e-6)
            assert bool((whole[row, length:] == 0).all())
        at = torch.zeros(3, 9, dtype=torch.bool)
        at[0, 3] = at[1, 2] = True
        assert torch.equal(net(wild, mask=mask, at=at), torch.stack([whole[0, 3], whole[1, 2]]))
    with pytest.raises(ValueError, match="padded at their end"):
        net(x, mask=1 - mask)


def test_several_risks_a_step_and_what_does_not_fit():
    with torch.no_grad():
        assert stage_72(3, input_size=4).eval()(torch.zeros(2, 5, 4)).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="not whole"):
        StageNet(7, 2, None, 3)


def test_a_campaign_runs_over_labelled_steps():
    torch.manual_seed(0)
    net = stage_conv_72(input_size=4).eval()
    x, at = torch.randn(6, 5, 4), torch.zeros(6, 5, dtype=torch.bool)
    at[:, 3:] = True
    with torch.no_grad():
        risk = net(x, at=at)
    data = [({"x": x, "at": at}, (risk > risk.median()).long())]
    found = fp.assess(net, data=data, faults=fp.BitErrorRate(1e-2), trials=5, metrics=("accuracy", "auroc"))
    assert found.golden["auroc"] == 1.0
    assert found.trials["samples"].tolist() == [12] * 5
    assert found.summary["critical_total"][0] > 0
