"""Fence: two-sided bounds behind layers, against slow references in plain Python."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import flipproof as fp
from flipproof.errors import ConfigError, FlipproofWarning
from flipproof.hardening.bounds.bounded import Bounded, Saturate, ZeroAbove
from flipproof.hardening.methods.fence import Fence
from flipproof.hardening.methods.guard import GuardedLinear
from flipproof.hardening.report import hardening_report
from flipproof.hardening.rewriting.layers import Fenced
from flipproof.models import digits_cnn, stage_conv_72

pytestmark = pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
TIGHT = Fence(slack=1.0, outputs=False, replace="bound")


class Anything(nn.Module):
    """A layer, an activation behind it, and scores from whatever comes out."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.act, self.head = layer, nn.ReLU(), nn.Linear(1, 3)

    def forward(self, x):
        return self.head(self.act(self.layer(x)).flatten(1).mean(1, keepdim=True))


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(3, 4, 2), (3, 7), 1),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 2), (3, 5, 6), 1),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 4, 3), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), (3, 4, 4), 1),
    "Linear": (lambda: nn.Linear(5, 4), (5,), 1),
    "Linear of sequences": (lambda: nn.Linear(5, 4), (6, 5), 2),
    "Linear of maps": (lambda: nn.Linear(5, 4), (2, 6, 5), 3),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (4,), 1),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(4), (4, 5), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (4, 5, 5), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 5, 5), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3), 1),
    "LayerNorm": (lambda: nn.LayerNorm(5), (6, 5), 2),
    "LayerNorm of maps": (lambda: nn.LayerNorm((4, 3)), (4, 3), 1),
    "RMSNorm": (lambda: nn.RMSNorm(5), (6, 5), 2),
}


def batches(shape, seed=0, count=32):
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return [(x[: count // 2], torch.arange(count // 2) % 3), (x[count // 2 :], torch.arange(count // 2) % 3)]


def extremes_by_channel(values, axis):
    """{channel: (smallest, largest)}, one number after the other."""
    found = {}
    for place in torch.cartesian_prod(*(torch.arange(size) for size in values.shape)).tolist():
        value = float(values[tuple(place)])
        low, high = found.get(place[axis], (math.inf, -math.inf))
        found[place[axis]] = (min(low, value), max(high, value))
    return [found[channel] for channel in sorted(found)]


@pytest.mark.parametrize("kind", LAYERS)
def test_bounds_are_the_extremes_of_each_channel(kind, fitted_on):
    make, shape, axis = LAYERS[kind]
    torch.manual_seed(1)
    net, data = Anything(make()).eval(), batches(shape)
    safe = fp.harden(net, TIGHT, data=data, progress=False)
    fence = safe.layer.fence
    with torch.no_grad():
        values = torch.cat([net.layer(x) for x, _ in fitted_on(net, data, TIGHT)])
    expected = extremes_by_channel(values, axis)
    assert type(fence) is Saturate
    assert fence.threshold.flatten().tolist() == [high for _, high in expected]
    assert fence.low.flatten().tolist() == [low for low, _ in expected]
    # the bound of a channel meets that channel's values and no others
    with torch.no_grad():
        wild = values + 100 * torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
        result = fence(wild)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in values.shape)).tolist()[::7]:
        low, high = expected[place[axis]]
        assert float(result[tuple(place)]) == min(max(float(wild[tuple(place)]), low), high)


@pytest.mark.parametrize(("replace", "kind"), [("bound", Saturate), ("zero", ZeroAbove)])
def test_what_lies_outside_is_replaced(replace, kind):
    """A slow scalar clamp, on finite and other values."""
    safe = fp.harden(
        Anything(nn.Linear(5, 4)), Fence(slack=1.0, outputs=False, replace=replace), data=batches((5,)), progress=False
    )
    fence = safe.layer.fence
    assert type(fence) is kind
    highs, lows = fence.threshold.tolist(), fence.low.tolist()
    x = torch.tensor([0.1, -0.1, 9.0, -9.0, 1e38, math.inf, -math.inf, math.nan]).repeat(4, 1).T.contiguous()
    for row, given in zip(fence(x).tolist(), x.tolist(), strict=True):
        for value, v, low, high in zip(row, given, lows, highs, strict=True):
            if math.isnan(v):
                assert value == 0
            elif low <= v <= high:
                assert value == v
            else:
                assert value == ((high if v > high else low) if replace == "bound" else 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_no_broken_parameter_lets_nan_or_infinity_through(value):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    x = batches((1, 6, 6))
    for replace in ("bound", "zero"):
        for name in ("0.weight", "1.weight", "1.running_var", "0.fence.threshold", "0.fence.low", "1.fence.low"):
            safe = fp.harden(net, Fence(replace=replace), data=x, progress=False, gate=False).eval()
            with torch.no_grad():
                safe.state_dict()[name].view(-1)[0] = value
                for layer in (safe[:1], safe[:2], safe):
                    assert bool(torch.isfinite(layer(x[0][0])).all()), (replace, name)


@pytest.mark.parametrize("wrong", [-1e6, 1e6])
def test_a_fault_in_a_branch_does_not_take_the_sum_with_it(wrong):
    """The reason for bounds behind layers: Guard zeroes the whole sum that a faulty branch ends in."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.act = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()
            self.head = nn.Linear(4, 3)
            with torch.no_grad():
                self.conv.weight.mul_(0.1)

        def sum(self, x):
            x = self.act(self.stem(x))
            return self.act(x + self.conv(x))

        def forward(self, x):
            return self.head(self.sum(x).mean((2, 3)))

    torch.manual_seed(0)
    net, data = Residual().eval(), batches((1, 4, 4))
    x, lost = data[0][0], {}
    with torch.no_grad():
        for method in (fp.Guard(), Fence()):
            safe = fp.harden(net, method, data=data, progress=False)
            safe.conv.weight[:] = wrong
            lost[type(method)] = float((safe(x) - net(x)).abs().mean())
    assert lost[Fence] < 0.5 * lost[fp.Guard]


def test_stagenet_s_convolution_is_reached():
    torch.manual_seed(0)
    net = stage_conv_72(input_size=5).eval()
    x = torch.randn(12, 6, 5, generator=torch.Generator().manual_seed(0))
    at = torch.ones(3, 6, dtype=torch.bool)
    data = [({"x": part, "at": at}, torch.arange(18) % 2) for part in x.split(3)]
    avc, fenced = (fp.harden(net, method, data=data, progress=False) for method in (fp.AVC(), Fence()))
    sites = {site.name: site for site in hardening_report(fenced).sites}
    assert sites["conv:0"].module == "conv.fence"
    assert fenced.conv.fence.threshold.shape == (72, 1)
    assert sites["recurrent:0"].calls == 6
    assert fenced.recurrent.fence.low.shape == (4 * 72 + 2 * 2,)
    seen = {}
    with torch.no_grad():
        for name, safe in (("avc", avc), ("fence", fenced)):
            safe.conv.weight[3] = 1e30
            safe.conv.register_forward_hook(lambda m, a, result, name=name: seen.__setitem__(name, result))
            safe(x)
    assert float(seen["avc"].abs().max()) > 1e25
    inside = (seen["fence"] <= fenced.conv.fence.threshold) & (seen["fence"] >= fenced.conv.fence.low)
    assert bool((inside | (seen["fence"] == 0)).all())


def test_several_calls_share_bounds_and_tied_layers_are_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = self.again = nn.Linear(4, 4)
            self.act, self.out = nn.ReLU(), nn.Linear(4, 3)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.fc.weight

        def forward(self, x):
            return self.out(self.tied(self.again(self.act(self.fc(x)))))

    torch.manual_seed(0)
    net, data = Twice(), batches((4,))
    safe = fp.harden(net, TIGHT, data=data, progress=False)
    sites = {site.name: site.calls for site in hardening_report(safe).sites}
    assert sites == {"fc:0": 2, "act:0": 1, "tied:0": 1, "out:0": 1}
    assert safe.fc is safe.again
    assert safe.tied.weight is safe.fc.weight
    assert any("fc:0 runs 2 times" in note for note in hardening_report(safe).notes)
    assert [type(layer) for layer in (net.fc, net.tied, net.out)] == [nn.Linear] * 3  # the model itself is as it was


def test_class_scores_get_a_guard_instead():
    data = batches((5,))
    safe = fp.harden(Anything(nn.Linear(5, 4)), Fence(), data=data, progress=False)
    assert type(safe.head) is GuardedLinear
    assert [site.name for site in hardening_report(safe).sites] == ["layer:0", "act:0"]
    assert hardening_report(safe).thresholds == 2 * 4 + 4 + 3 + 1
    assert "1 activations and 1 outputs of layers bounded by 16 stored" in str(hardening_report(safe))
    open_ = fp.harden(Anything(nn.Linear(5, 4)), TIGHT, data=data, progress=False)
    assert isinstance(open_.head, Fenced)
    assert hardening_report(open_).thresholds == 2 * 4 + 4 + 2 * 3


def test_clean_data_is_left_alone(fitted_on):
    net, data = digits_cnn().eval(), batches((1, 8, 8))
    data = [(x, y % 10) for x, y in data]
    safe = fp.harden(net, Fence(), data=data, progress=False)
    for x, _ in fitted_on(net, data, Fence()):
        assert torch.equal(safe(x), net(x))


def test_bounds_lie_where_the_house_s_rule_puts_them():
    """The same slack as everywhere, on both sides."""
    net, data = Anything(nn.Linear(5, 4)), batches((5,), count=64)
    tight, loose = (fp.harden(net, Fence(slack=s, outputs=False), data=data, progress=False) for s in (1.0, 2.0))
    low, high = tight.layer.fence.low, tight.layer.fence.threshold
    for channel in range(4):
        a, b = float(low[channel]), float(high[channel])
        mean_a, mean_b = float(low.abs().mean()), float(high.abs().mean())
        assert float(loose.layer.fence.threshold[channel]) == pytest.approx(b + max(abs(b), mean_b, (b - a) / 4))
        assert float(loose.layer.fence.low[channel]) == pytest.approx(a - max(abs(a), mean_a, (b - a) / 4))


def test_travels(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    data = batches((1, 6, 6))
    x = data[0][0]
    safe = fp.harden(net, Fence(), data=data, progress=False)
    assert [name for name in safe.state_dict() if name not in net.state_dict()] == [
        "0.fence.threshold", "0.fence.low", "1.fence.threshold", "1.fence.low", "2.threshold", "4.threshold", "4.rest",
    ]  # fmt: skip
    again = fp.load_hardened(net, fp.save_hardened(safe, tmp_path / "safe.safetensors"))
    assert hardening_report(again).sites == hardening_report(safe).sites
    assert all(torch.equal(value, safe.state_dict()[name]) for name, value in again.state_dict().items())
    exported = torch.export.export(safe, (x,)).module()
    for other in (again, copy.deepcopy(safe), pickle.loads(pickle.dumps(safe)), exported):
        assert torch.equal(other(x), safe(x))
    assert type(safe[0]) is type(again[0])
    assert [type(layer) for layer in net] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear]


def test_onnx_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    data = batches((1, 6, 6))
    safe = fp.harden(net, Fence(), data=data, progress=False)
    with torch.no_grad():
        safe[0].weight[1] = 1e30
    x = data[0][0]
    torch.onnx.export(safe, (x,), tmp_path / "safe.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "safe.onnx")
    given = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(given), safe(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).to(dtype).eval()
    data = [(x.to(dtype), y) for x, y in batches((5,))]
    safe = fp.harden(net, Fence(), data=data, progress=False)
    assert {p.dtype for p in safe.parameters()} == {dtype}
    assert torch.equal(safe(data[0][0]), net(data[0][0]))


def test_bounds_are_in_the_fault_space_and_campaigns_are_the_same_cut_or_whole():
    """`audit=1.0` runs every trial again whole, on a fresh copy, and stops at the first difference."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    data = batches((1, 6, 6))
    safe = fp.harden(net, Fence(), data=data, progress=False)
    space = fp.FaultSpace(safe)
    assert {"0.fence.threshold", "0.fence.low", "1.fence.low"} <= {site.name for site in space.sites}
    assert space.bits == 32 * sum(p.numel() for p in safe.parameters())
    found = fp.assess(safe, data=data, faults=fp.BitErrorRate([1e-3]), trials=30, audit=1.0, progress=False)
    assert int(found.summary["due"].iloc[0]) == 0


def test_what_is_called_as_no_module_is_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.fc, self.act, self.head = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.act(self.fc(self.attend(x, x, x)[0]))).mean(1)

    with pytest.warns(FlipproofWarning, match=r"attend\.out_proj:0"):
        safe = fp.harden(Attention().eval(), Fence(), data=batches((5, 4)), progress=False)
    (entry,) = hardening_report(safe).unreachable
    assert entry.name == "attend.out_proj:0"
    assert not isinstance(safe.attend.out_proj, Fenced)


def test_subclasses_and_packed_weights():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 0.5

    class Rectifying(nn.Linear):
        def forward(self, x):
            return torch.relu(super().forward(x))

    net = nn.Sequential(Standardised(1, 3, 3), nn.Flatten(), Rectifying(48, 8), nn.Linear(8, 3)).eval()
    data = batches((1, 6, 6))
    with pytest.warns(FlipproofWarning, match="computes activations in its own forward"):
        safe = fp.harden(net, Fence(), data=data, progress=False)
    assert isinstance(safe[0], Standardised)
    assert isinstance(safe[0].fence, Bounded)
    x = data[0][0]
    assert torch.equal(safe(x), net(x))
    plain = fp.harden(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval(), Fence(), data=data
    )
    fp.pack_(plain, fp.Affine(bits=8))
    assert parametrize.is_parametrized(plain[0]) or any("words" in name for name, _ in plain.named_buffers())
    assert torch.equal(copy.deepcopy(plain)(x), plain(x))


@pytest.mark.parametrize("bad", [{"per": "neuron"}, {"replace": "mean"}, {"slack": 0.5}])
def test_nonsense_is_refused(bad):
    with pytest.raises(ConfigError, match="Fence"):
        Fence(**bad)
