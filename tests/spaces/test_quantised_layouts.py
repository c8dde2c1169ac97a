"""Quantised layers whose words are plain tensors: GPTQ's buffers, the states of bitsandbytes, PT2E's graphs."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.engine.cluster import packed
from flipproof.faults import TrialGenerator
from flipproof.formats import Integer
from flipproof.spaces.contract import Faults, Space
from flipproof.spaces.parameters import FaultSpace
from flipproof.testing import SpaceContract

GROUP = 8


class GPTQLinear(nn.Module):
    """GPTQ's layout: eight codes of 4 bits in an int32, down the inputs; zero points packed along the outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        groups = inputs // GROUP
        high = 2**31
        words = torch.randint(-high, high, (inputs // 8, outputs)).to(torch.int32)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", torch.randint(-high, high, (groups, outputs // 8)).to(torch.int32))
        self.register_buffer("scales", (torch.rand(groups, outputs) * 0.1 + 0.01).half())
        self.register_buffer("g_idx", (torch.arange(inputs) // GROUP).to(torch.int32))
        self.register_buffer("bias", torch.randn(outputs).half())

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        zeros = (self.qzeros[:, :, None] >> shifts & 15).reshape(len(self.qzeros), -1) + 1
        codes = (self.qweight[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, self.qweight.shape[1])
        group = self.g_idx.long()
        weight = self.scales[group].float() * (codes - zeros[group])
        return x @ weight + self.bias.float()


class Words(nn.Parameter):
    """A parameter that carries its quantisation state, as bitsandbytes' `Params4bit` and `Int8Params` do."""

    quant_state: object

    def __deepcopy__(self, memo: dict[int, object]) -> Words:
        made = Words(self.data.clone(), requires_grad=False)
        memo[id(self)] = made
        memo[id(self.data)] = made.data
        for key, value in vars(self).items():  # CB is the data itself
            shares = isinstance(value, Tensor) and value.data_ptr() == self.data_ptr()
            setattr(made, key, made.data if shares else copy.deepcopy(value, memo))
        return made


@dataclass
class State:
    """What 4-bit words are decoded with: the largest magnitude of each block, and what a code stands for."""

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int
    shape: tuple[int, int]
    nested: State | None = None


def words(data: Tensor) -> nn.Parameter:
    return Words(data, requires_grad=False)


class Linear4bit(nn.Module):
    """bitsandbytes' 4-bit layout: two codes a byte, the first in the high half; absmax is itself 8-bit and nested."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        blocks = inputs * outputs // 16
        self.weight = words(torch.randint(0, 256, (inputs * outputs // 2, 1), dtype=torch.uint8))
        nested = State(torch.rand(1) * 0.3 + 0.1, torch.linspace(-1, 1, 256), torch.zeros(()), 64, (blocks, 1))
        self.weight.quant_state = State(
            torch.randint(128, 256, (blocks,), dtype=torch.uint8),
            torch.linspace(-1, 1, 16),
            torch.tensor(0.2),
            16,
            (outputs, inputs),
            nested,
        )
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        inner = state.nested
        absmax = inner.code[state.absmax.long()] * inner.absmax + state.offset
        byte = self.weight.data.reshape(-1)
        codes = torch.stack([byte >> 4, byte & 15], dim=1).reshape(-1).long()
        weight = (state.code[codes].reshape(-1, state.blocksize) * absmax[:, None]).reshape(state.shape)
        return x @ weight.t() + self.bias


class Matmul:
    """What `Linear8bitLt` keeps between calls."""

    CB: Tensor | None = None
    SCB: Tensor | None = None


class Linear8bit(nn.Module):
    """bitsandbytes' int8 layout: words with a scale a row, which move into a state at the first forward."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = words(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        self.weight.CB, self.weight.SCB = self.weight.data, torch.rand(outputs) + 0.5
        self.state = Matmul()
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.CB is not None:
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        return x @ (self.state.CB.float() * self.state.SCB[:, None] / 127).t() + self.bias


class CompressedLinear(nn.Module):
    """compressed-tensors' layout: int8 words, scales and zero points as parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(outputs, 1) * 0.02)
        zeros = torch.randint(-3, 3, (outputs, 1), dtype=torch.int8)
        self.weight_zero_point = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.weight.float() - self.weight_zero_point) * self.weight_scale).t()


LAYERS = {"gptq": GPTQLinear, "4 bit": Linear4bit, "8 bit": Linear8bit, "compressed": CompressedLinear}
EXPECTED = {
    "gptq": {
        "qweight": ("weight", Integer(32), 16 * 8 // 8),
        "qzeros": ("zero_point", Integer(32), 2),
        "scales": ("scale", fp.Float16(), 16),
        "bias": ("bias", fp.Float16(), 8),
    },
    "4 bit": {
        "weight": ("weight", Integer(8, signed=False), 64),
        "weight.quant_state.absmax": ("scale", Integer(8, signed=False), 8),
        "weight.quant_state.code": ("other", fp.Float32(), 16),
        "weight.quant_state.offset": ("other", fp.Float32(), 1),
        "weight.quant_state.nested.absmax": ("scale", fp.Float32(), 1),
        "weight.quant_state.nested.code": ("other", fp.Float32(), 256),
        "weight.quant_state.nested.offset": ("other", fp.Float32(), 1),
        "bias": ("bias", fp.Float32(), 8),
    },
    "8 bit": {
        "weight": ("weight", Integer(8), 128),
        "weight.SCB": ("scale", fp.Float32(), 8),
        "bias": ("bias", fp.Float32(), 8),
    },
    "compressed": {
        "weight": ("weight", Integer(8), 128),
        "weight_scale": ("scale", fp.Float32(), 8),
        "weight_zero_point": ("zero_point", Integer(8), 8),
    },
}


def network(layout: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), LAYERS[layout](16, 8)).eval()


def inputs() -> Tensor:
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


def data(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(x, net(x).argmax(dim=1)) for x in inputs().split(10)]


@pytest.mark.parametrize("layout", LAYERS)
def test_words_scales_and_zero_points_are_in_the_space_without_being_asked_for(layout):
    net = network(layout)
    space = FaultSpace(net)
    sites = {site.name.removeprefix("2."): site for site in space.sites if site.layer == "2"}
    assert {name: (s.kind, s.format, s.values) for name, s in sites.items()} == EXPECTED[layout]
    if layout == "gptq":  # indices: a fault in them can stop a CUDA device for good
        assert space.left_out == {"2.g_idx": "a buffer: fp.Parameters(buffers=True) takes it"}
        space = FaultSpace(net, where=fp.Parameters(buffers=True))
        assert {site.name for site in space.sites if site.kind == "buffer"} == {"2.g_idx"}
    assert space.left_out == {}
    assert space.coverage == 1
    if layout == "8 bit":
        assert sites["weight"].aliases == ("2.weight.CB",)


@pytest.mark.parametrize("layout", LAYERS)
def test_faults_change_exactly_these_bits_where_the_layer_reads_them(layout):
    net, x = network(layout), inputs()
    space = FaultSpace(net, where=fp.Parameters(buffers=True, exclude="2.g_idx"))
    with torch.no_grad():
        golden = net(x)
    tensors = {name: tensor for name, tensor in space.tensors.items() if name.startswith("2.")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    differing = 0
    for trial in range(200):
        draw = Faults(TrialGenerator(0, layout, trial).distinct(1 + trial % 4, space.bits))
        places = space.places(draw)
        fresh = network(layout)  # changed by hand, through the layer's own attributes
        for name, value, bit in places:
            tensor = fresh
            for part in name.split("."):
                tensor = tensor[int(part)] if part.isdigit() else getattr(tensor, part)
            memory = tensor.detach().reshape(-1).view(torch.uint8).numpy()
            memory[value * tensor.element_size() + bit // 8] ^= np.uint8(1 << bit % 8)
        with torch.no_grad():
            expected = fresh(x)
            with space.corrupted(draw):
                found = net(x)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        differing += not torch.equal(found, golden)
    assert differing > 100
    assert all(
        torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8))
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("layout", LAYERS)
def test_campaigns_are_audited_and_give_everything_back(layout):
    net = network(layout)
    labelled = data(network(layout))
    where = fp.Parameters(exclude="2.g_idx")
    setup = {"faults": fp.RandomBits([1, 20]), "trials": 8, "where": where}
    found = fp.assess(net, labelled, **setup, audit=1.0)
    assert found.trials["audited"].all()
    assert found.summary["masked"].iloc[1] < 1
    if layout == "8 bit":  # what its first forward moves is where it was
        assert net[2].weight.CB is not None
        assert net[2].state.CB is None
    two = fp.assess(network(layout), labelled, **setup, workers=2)
    drop = ["seconds", "audited"]
    assert two.trials.drop(columns=drop).equals(found.trials.drop(columns=drop))


@pytest.mark.parametrize("layout", LAYERS)
def test_model_and_space_are_sent_to_other_machines(layout):
    net, x = network(layout), inputs()
    net(x)
    space = FaultSpace(net, where=fp.Parameters(exclude="2.g_idx"))
    there, space_there = torch.load(io.BytesIO(packed((net, space))), weights_only=False)
    with torch.no_grad():
        for trial in range(5):
            draw = Faults(TrialGenerator(0, "sent", trial).distinct(9, space.bits))
            with space.corrupted(draw), space_there.corrupted(draw):
                assert torch.equal(there(x).view(torch.int32), net(x).view(torch.int32))


def test_four_bit_words_by_hand():
    """One bit of a byte is one bit of one code: the other code of the byte, and all else, stay."""
    net = Linear4bit(16, 8)
    space = FaultSpace(net)
    eye = torch.eye(16)
    with torch.no_grad():
        golden = (net(eye) - net.bias).t()
        code = net.weight.quant_state.code
        for value, bit in ((0, 0), (0, 7), (13, 4), (63, 3)):
            with space.corrupted(space.faults([("weight", value, bit)])):
                found = (net(eye) - net.bias).t()
            place = 2 * value + (bit < 4)
            changed = (found - golden).abs().reshape(-1) > 1e-6
            assert changed.nonzero().flatten().tolist() == [place]
            byte = int(net.weight.view(-1)[value])
            old = byte >> 4 if bit >= 4 else byte & 15
            new = old ^ 1 << bit % 4
            ratio = found.reshape(-1)[place] / golden.reshape(-1)[place]
            assert torch.allclose(ratio, code[new] / code[old], atol=1e-4)


def test_a_float_model_is_described_as_before():
    """Names such as scale mean nothing where nothing is quantised."""
    net = nn.Linear(3, 2)
    net.scale = nn.Parameter(torch.ones(2))
    net.register_buffer("zeros", torch.zeros(3))
    space = FaultSpace(net, where=fp.Parameters(buffers=True))
    assert [(site.name, site.kind) for site in space.sites] == [
        ("weight", "weight"),
        ("bias", "bias"),
        ("scale", "other"),
        ("zeros", "buffer"),
    ]


def exported() -> tuple[nn.Module, Tensor]:
    """A network that torchao's PT2E quantised: int8 buffers and scales in a traced graph."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net, x = (
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval(),
            torch.randn(12, 1, 6, 6),
        )
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
        prepared(x)
        return pt2e.convert_pt2e(prepared), x


def test_pt2e_models():
    net, x = exported()
    space = FaultSpace(net)
    kinds = {site.name: (site.kind, site.format) for site in space.sites}
    assert kinds["_frozen_param0"] == kinds["_frozen_param1"] == ("weight", Integer(8))
    assert kinds["_scale_0"] == ("scale", fp.Float32())
    assert kinds["_zero_point_0"] == ("zero_point", Integer(64))
    never = "a graph was traced of the model, and no step of it reads this"
    assert space.left_out == {"0.weight": never, "3.weight": never}  # the float weights that were quantised
    assert space.left_out_bits == 0
    training = net.training
    with torch.no_grad():
        golden = net(x)
        words, scale = net._frozen_param1.clone(), net._scale_1.clone()
        hidden = _before_last(net, x)
        for value, bit in ((0, 7), (17, 3), (239, 0)):
            with space.corrupted(space.faults([("_frozen_param1", value, bit)])):
                found = net(x)
            by_hand = words.clone()
            by_hand.view(-1).view(torch.uint8)[value] ^= 1 << bit
            expected = hidden @ (by_hand.float() * scale[:, None]).t() + net.get_parameter("3.bias")
            assert torch.allclose(found, expected, atol=1e-4)
            assert not torch.equal(found, golden)
    found = fp.assess(net, [(x, golden.argmax(dim=1))], faults=fp.RandomBits([1, 20]), trials=6, audit=1.0)
    assert found.coverage == 1
    assert net.training == training
    assert torch.equal(net._frozen_param1, words)


def _before_last(net: nn.Module, x: Tensor) -> Tensor:
    """What goes into the last layer: its inputs as the identity gives them back."""
    seen: list[Tensor] = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
                seen.append(args[1] if function is torch.ops.aten.addmm.default else args[0])
            return function(*args, **(kwargs or {}))

    with Look():
        net(x)
    return seen[-1]


class Contract(SpaceContract):
    layout = "gptq"

    def network(self) -> nn.Module:
        return network(self.layout)

    def space(self, network: nn.Module) -> Space:
        return FaultSpace(network, where=fp.Parameters(exclude=["0", "2.g_idx", "*.code"]))

    def run(self, network: nn.Module) -> Tensor:
        return network(inputs())


class TestGPTQ(Contract):
    pass


class TestFourBit(Contract):
    layout = "4 bit"


class TestEightBit(Contract):
    layout = "8 bit"
    travels = False  # by plain pickle

    def network(self) -> nn.Module:
        net = super().network()
        net(inputs())  # its first forward moves things, which a campaign would put back
        return net


@pytest.mark.parametrize("layout", LAYERS)
def test_every_bit_of_a_layout_flipped_alone(layout):
    """`inject_all` shares forwards between flips, where that is proved; by hand, each flip has its own."""
    net, x = network(layout), inputs()
    with torch.no_grad():
        golden = net(x)
        where = fp.Parameters(include="2", kinds=("scale", "zero_point", "bias"), exclude="2.qzeros")
        table = fp.inject_all(net, [(x, golden.argmax(dim=1))], where=where, progress=False)
        space = FaultSpace(net, where=where)
        masked = critical = due = 0
        for bit in range(space.bits):
            with space.corrupted(Faults(np.array([bit]))):
                found = net(x)
            lost = found.isnan().any(dim=1)
            due += int(lost.sum())
            critical += int((~lost & (found.argmax(dim=1) != golden.argmax(dim=1))).sum())
            masked += int((found.view(torch.int32) == golden.view(torch.int32)).all(dim=1).sum())
    assert table.bits[["masked", "critical_sdc", "due"]].sum().tolist() == [masked, critical, due]
    assert table.bits["tried"].sum() == space.bits
