"""Multiply-accumulates against closed forms and torch's own counter, and who made them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flipproof as fp
from flipproof.analysis._multiplications import Multiplications

BATCH, STEPS = 3, 5


class Heads(nn.Module):
    """Attention, a Parameter in a function, a Linear whose weight alone is used, HF's Conv1D, a plain head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.used = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.mixer = Conv1D(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = F.linear(x, self.used.weight) + F.linear(x, self.table)
        return self.head(self.mixer(x).mean(1))


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a Linear with a transposed weight and a class of its own."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


CLOSED = {
    "linear": (nn.Linear(4, 7), (BATCH, 4), BATCH * 4 * 7),
    "linear over steps": (nn.Linear(4, 7, bias=False), (BATCH, STEPS, 4), BATCH * STEPS * 4 * 7),
    "conv1d": (nn.Conv1d(4, 6, 3), (BATCH, 4, 10), BATCH * 6 * 8 * 4 * 3),
    "conv2d": (nn.Conv2d(3, 6, 3, padding=1), (BATCH, 3, 8, 8), BATCH * 6 * 64 * 3 * 9),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (BATCH, 4, 8, 8), BATCH * 6 * 36 * 2 * 9),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (BATCH, 4, 8, 8), BATCH * 4 * 36 * 9),
    "dilation, stride": (
        nn.Conv2d(3, 5, (3, 2), dilation=2, stride=(1, 2)),
        (BATCH, 3, 9, 9),
        BATCH * 5 * (5 * 4) * 3 * 6,
    ),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (BATCH, 4, 5, 5), BATCH * 4 * 25 * 3 * 9),
    "lstm": (nn.LSTM(3, 5, batch_first=True), (BATCH, STEPS, 3), BATCH * STEPS * 4 * 5 * (3 + 5)),
    "lstm, 2 layers, both ways": (
        nn.LSTM(3, 5, 2, bidirectional=True),
        (STEPS, BATCH, 3),
        BATCH * STEPS * 4 * 5 * 2 * ((3 + 5) + (2 * 5 + 5)),
    ),
    "lstm, projected": (
        nn.LSTM(3, 5, proj_size=2, batch_first=True),
        (BATCH, STEPS, 3),
        BATCH * STEPS * (4 * 5 * (3 + 2) + 5 * 2),
    ),
    "gru": (nn.GRU(3, 5, 2, batch_first=True), (BATCH, STEPS, 3), BATCH * STEPS * 3 * 5 * ((3 + 5) + (5 + 5))),
    "bilinear": (nn.Bilinear(3, 4, 5), ((BATCH, 3), (BATCH, 4)), BATCH * 3 * 4 * 5),
    "transformer layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (BATCH, STEPS, 8),
        BATCH * STEPS * (4 * 8 * 8 + 2 * 8 * 16) + 2 * BATCH * STEPS**2 * 8,
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", CLOSED)
def test_counts_are_the_closed_form(name):
    net, shape, expected = CLOSED[name]
    x = torch.randn(shape) if isinstance(shape[0], int) else tuple(torch.randn(part) for part in shape)
    assert Multiplications.of(net, x).total == expected


@pytest.mark.parametrize("length", [STEPS, 7])
def test_attention_counts_projections_and_both_products(length):
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    query, memory = torch.randn(BATCH, STEPS, 8), torch.randn(BATCH, length, 8)
    projections = BATCH * (2 * STEPS + 2 * length) * 8 * 8
    assert Multiplications.of(net, (query, memory, memory)).total == projections + 2 * BATCH * STEPS * length * 8


@pytest.mark.parametrize("net", [nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(216, 4)), None])
def test_torch_counts_twice_as_many_operations(net):
    net, x = (net, torch.randn(BATCH, 3, 8, 8)) if net is not None else (Heads(), torch.randn(BATCH, STEPS, 8))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # it does not see the fused attention of a CPU: sdpa_kernel makes it show its products
        with FlopCounterMode(display=False) as theirs, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert Multiplications.of(net, x).total * 2 == theirs.get_total_flops()


def test_behind_is_what_runs_after_each_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.lstm, self.last = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.shared(torch.tanh(self.shared(x))))[0][:, -1])

    made = Multiplications.of(Twice(), torch.randn(BATCH, STEPS, 4))
    linear, lstm, last = BATCH * STEPS * 16, BATCH * STEPS * 16 * 8, BATCH * 4 * 2
    assert made.total == 2 * linear + lstm + last
    assert made.behind("shared", 0) == linear + lstm + last
    assert made.behind("shared", 1) == lstm + last  # a recurrent layer is not free
    assert made.behind("lstm") == last
    assert made.behind("last") == 0
    assert made.behind("nowhere") == made.total


def test_the_model_comes_back_as_it_was():
    net = Heads().train()
    fast = torch.backends.mha.get_fastpath_enabled()
    Multiplications.of(net, torch.randn(BATCH, STEPS, 8))
    assert net.training
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_nothing_that_multiplies_is_invisible():
    """The map speaks of the head alone; everything else is named, with the share that it is not."""
    data = [(torch.randn(BATCH, STEPS, 8), torch.zeros(BATCH))]
    found = fp.analyze(Heads(), data, fp.DeepVigor(holes=0))
    assert list(found.layers["layer"]) == ["head"]
    assert found.left_out.keys() == {
        "attention", "attention (activations × activations)", "attention.out_proj", "used", "table", "mixer",
    }  # fmt: skip
    everything = BATCH * STEPS * 64 * (4 + 1 + 1 + 1) + 2 * BATCH * STEPS**2 * 8 + BATCH * 8 * 3
    assert found.coverage == pytest.approx(BATCH * 8 * 3 / everything)
    assert "0.9 % of the multiplications" in repr(found)
    with pytest.raises(fp.FlipproofError, match=r"mixer.*covered_only=True"):
        found.total()
    assert found.total(covered_only=True)["factor"] == pytest.approx(found.layers["lvf"].item())


def test_whole_networks_are_covered_and_have_a_total():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.randn(BATCH, 1, 4, 4), torch.zeros(BATCH))]
    found = fp.analyze(net, data, fp.DeepVigor(holes=0))
    assert (found.coverage, found.left_out) == (1.0, {})
    lvf = found.layers.set_index("layer")["lvf"]
    assert found.total()["factor"] == pytest.approx((8 * lvf["0"] + 3 * lvf["4"]) / 11)
    part = fp.analyze(net, data, fp.DeepVigor(holes=0), where=fp.Neurons("4"))
    assert part.left_out == {"0": "not selected by where="}
    assert part.coverage == pytest.approx(24 / (2 * 4 * 9 + 24))
    with pytest.raises(fp.FlipproofError, match="not selected"):
        part.total()
