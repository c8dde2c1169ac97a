"""Models that torchao quantised: every word, scale and zero point is hit where its kernels read it."""

from __future__ import annotations

import copy
import io
import warnings

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

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (flipproof[quant])")

CONFIGS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int8 dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "int4 groups": lambda: quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(8)
    ),
    "fp8": lambda: quantization.Float8WeightOnlyConfig(),
}


def quantised(config: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    net = net.to(dtype).eval()
    quantization.quantize_(net, CONFIGS[config](), filter_fn=lambda module, name: name in ("0", "4"))
    return net


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def data(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(x, net(x).argmax(dim=1)) for x in inputs().split(10)]


def plain(net: nn.Module) -> dict[str, Tensor]:
    """The tensors inside, as they are read by name from the library's own attributes."""
    found = {}
    for layer in ("0", "4"):
        weight = net.get_submodule(layer).weight
        for name in ("qdata", "scale", "zero_point"):
            if getattr(weight, name, None) is not None:
                found[f"{layer}.weight.{name}"] = getattr(weight, name)
    return found | {name: p.detach() for name, p in net.named_parameters() if type(p) is nn.Parameter}


def flipped(tensors: dict[str, Tensor], places: list[tuple[str, int, int]]) -> dict[str, Tensor]:
    """Copies with these bits changed, byte by byte, by NumPy alone."""
    found = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, value, bit in places:
        memory = found[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        memory[value * found[name].element_size() + bit // 8] ^= np.uint8(1 << bit % 8)
        found[name] = torch.from_numpy(memory).view(found[name].dtype).reshape(found[name].shape)
    return found


def by_hand(config: str, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the network computes with these tensors, written down without torchao."""

    def layer(name: str, x: Tensor) -> Tensor:
        q, scale = tensors[f"{name}.weight.qdata"], tensors[f"{name}.weight.scale"]
        if config == "int8":
            return (x @ q.t().to(x.dtype)) * scale.flatten() + tensors[f"{name}.bias"]
        if config == "int8 dynamic":  # each row of the activations gets a symmetric scale of its own
            step = (x.abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
            codes = torch.clamp(torch.round(x * (1 / step)), -128, 127)  # the largest lies between two codes
            return (codes.double() @ q.double().t() * step * scale.flatten()).float() + tensors[f"{name}.bias"]
        if config == "fp8":
            return x @ (q.float() * scale).t() + tensors[f"{name}.bias"]
        zero = tensors[f"{name}.weight.zero_point"]
        whole = (q.reshape(len(q), -1, 8).float() - zero[..., None].float()) * scale[..., None]
        return x @ whole.reshape(q.shape).t() + tensors[f"{name}.bias"]

    x = torch.relu(layer("0", x))
    return layer("4", torch.relu(x @ tensors["2.weight"].t()))


def close(found: Tensor, expected: Tensor) -> bool:
    """Up to rounding of sums; where the numbers are beyond that, NaN and infinity in the same places."""
    return torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_words_scales_and_zero_points_are_sites_in_their_own_types(config):
    net = quantised(config)
    space = FaultSpace(net)
    sites = {site.name: site for site in space.sites}
    held = plain(net)
    assert set(sites) == set(held)
    assert space.left_out == {}
    assert space.coverage == 1
    assert space.bits == sum(8 * tensor.nbytes for tensor in held.values())
    word = fp.Float8E4M3() if config == "fp8" else Integer(8)
    for layer in ("0", "4"):
        words, scale = sites[f"{layer}.weight.qdata"], sites[f"{layer}.weight.scale"]
        assert (words.kind, words.format, words.layer) == ("weight", word, layer)
        assert (scale.kind, scale.format, scale.layer) == ("scale", fp.Float32(), layer)
        if config != "fp8":
            zero = sites[f"{layer}.weight.zero_point"]
            assert (zero.kind, zero.format) == ("zero_point", Integer(8))
    assert sites["2.weight"].format == fp.Float32()
    words = FaultSpace(net, where=fp.Parameters(kinds="weight"))
    assert [site.name for site in words.sites] == ["0.weight.qdata", "2.weight", "4.weight.qdata"]
    scales = FaultSpace(net, where=fp.Parameters(kinds="scale"))
    assert [site.name for site in scales.sites] == ["0.weight.scale", "4.weight.scale"]
    assert scales.left_out["0.weight.qdata"] == "not selected by where="
    for name, tensor in space.tensors.items():
        assert tensor.data_ptr() == held[name].data_ptr()  # the very memory that the kernels read


@pytest.mark.parametrize("config", CONFIGS)
def test_answers_under_faults_are_those_of_the_flipped_numbers(config, one_thread):
    """Against the same sums by hand, and bit by bit against the library on tensors that were flipped before."""
    net, x = quantised(config), inputs()
    golden = plain(net)
    before = {name: tensor.clone() for name, tensor in golden.items()}
    space = FaultSpace(net)
    with torch.no_grad():
        assert close(net(x), by_hand(config, golden, x))
    differing = agreeing = 0
    for trial in range(200):
        generator = TrialGenerator(0, "by hand", trial)
        draw = Faults(generator.distinct(1 if trial < 150 else 12, space.bits))
        expected = flipped(before, space.places(draw))
        fresh = quantised(config)
        for name, tensor in plain(fresh).items():
            tensor.copy_(expected[name])
        with torch.no_grad():
            answer = fresh(x)
            with space.corrupted(draw) as changed:
                assert changed == len(draw)
                assert all(
                    torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
                    for name, tensor in plain(net).items()
                )
                found = net(x)
        assert torch.equal(found.view(torch.int32), answer.view(torch.int32))
        hand = by_hand(config, expected, x)
        if float(hand.nan_to_num(posinf=1e30).abs().max()) < 1e15:  # beyond that, sums of huge numbers have no digits
            agreeing += 1
            assert close(found, hand), space.places(draw)
        differing += not torch.equal(found, net(x))
    assert agreeing > 150
    assert differing > 120
    assert all(
        torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) for name, tensor in plain(net).items()
    )


def test_a_scale_of_one_channel_changes_that_channel_alone(one_thread):
    net, x = quantised("int8"), inputs()
    space = FaultSpace(net)
    with torch.no_grad():
        golden = net(x)
        with space.corrupted(space.faults([("4.weight.scale", 2, 23)])):  # the lowest bit of the exponent
            found = net(x)
    differs = (found != golden).any(dim=0)
    assert differs.tolist() == [False, False, True, False]
    bias = net[4].bias.detach()
    ratio = (found - bias)[:, 2] / (golden - bias)[:, 2]
    assert torch.allclose(ratio, ratio[0].expand(20))
    assert float(ratio[0].log2().round().abs()) == 1


@pytest.mark.parametrize("config", ["int8", "int4 groups"])
def test_bfloat16_models(config, one_thread):
    net, x = quantised(config, torch.bfloat16), inputs(torch.bfloat16)
    space = FaultSpace(net)
    golden = {name: tensor.clone() for name, tensor in plain(net).items()}
    assert {site.format for site in space.sites if site.kind == "bias"} == {fp.BFloat16()}
    for trial in range(20):
        draw = Faults(TrialGenerator(0, "half", trial).distinct(5, space.bits))
        fresh = quantised(config, torch.bfloat16)
        expected = flipped(golden, space.places(draw))
        for name, tensor in plain(fresh).items():
            tensor.copy_(expected[name])
        with torch.no_grad(), space.corrupted(draw):
            assert torch.equal(net(x).view(torch.int16), fresh(x).view(torch.int16))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_campaign_is_audited_and_gives_the_model_back(config):
    net = quantised(config)
    weights = dict(net.named_parameters())
    memory = {name: tensor.data_ptr() for name, tensor in plain(net).items()}
    before = {name: tensor.clone() for name, tensor in plain(net).items()}
    found = fp.assess(net, data(net), faults=fp.RandomBits([1, 30]), trials=8, audit=1.0)
    assert found.coverage == 1
    assert found.trials["audited"].all()
    assert found.summary["masked"].iloc[1] < 1
    assert all(net.get_parameter(name) is p for name, p in weights.items())
    assert {name: tensor.data_ptr() for name, tensor in plain(net).items()} == memory
    assert all(
        torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) for name, tensor in plain(net).items()
    )
    again = fp.assess(quantised(config), data(net), faults=fp.RandomBits([1, 30]), trials=8, workers=2)
    assert again.trials.drop(columns=["seconds", "audited"]).equals(found.trials.drop(columns=["seconds", "audited"]))


def test_other_words_are_another_campaign(tmp_path):
    net = quantised("int8")
    setup = {"faults": fp.RandomBits(1), "trials": 2, "journal": tmp_path / "words.jsonl"}
    fp.assess(net, data(net), **setup)
    labelled = data(net)
    with torch.no_grad():
        net[0].weight.scale[0] *= 1.5
    with pytest.raises(fp.errors.JournalError, match="weights"):
        fp.assess(net, labelled, **setup)


def test_codes_around_integer_words_repair_them():
    net = quantised("int8")
    code = {"*": fp.BCH(fp.Integer(8), t=2), "*.scale": fp.SECDED(fp.Float32()), "*.bias": fp.SECDED(fp.Float32())}
    code["2.weight"] = fp.SECDED(fp.Float32())
    code = {pattern: code[pattern] for pattern in ("*.scale", "*.bias", "2.weight", "*")}
    space = FaultSpace(net, format=code)
    formats = {site.name: site.format for site in space.sites}
    assert formats["0.weight.qdata"] == formats["4.weight.zero_point"] == fp.BCH(fp.Integer(8), t=2)
    assert formats["0.weight.scale"] == fp.SECDED(fp.Float32())
    x = inputs()
    with torch.no_grad(), space.stored():
        golden = net(x)
        for trial in range(50):
            draw = Faults(TrialGenerator(0, "single", trial).distinct(1, space.bits))
            with space.corrupted(draw):
                assert space.word_outcomes == (1, 0, 0)
                assert torch.equal(net(x), golden)
        site = space.sites[0]
        three = [(site.name, 5, bit) for bit in (0, 3, 7)]
        with space.corrupted(space.faults(three)):
            assert space.word_outcomes == (0, 1, 0)  # beyond repair, and known to be
            assert int(net[0].weight.qdata.view(-1)[5]) == 0
    found = fp.assess(net, data(net), faults=fp.BitErrorRate(2e-3), format=code, trials=6, audit=1.0)
    plainly = fp.assess(net, data(net), faults=fp.BitErrorRate(2e-3), trials=6)
    assert found.summary["masked"].iloc[0] > plainly.summary["masked"].iloc[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_model_and_space_are_sent_to_other_machines(config, one_thread):
    net, x = quantised(config), inputs()
    space = FaultSpace(net)
    there, space_there = torch.load(io.BytesIO(packed((net, space))), weights_only=False)
    with torch.no_grad():
        for trial in range(5):
            draw = Faults(TrialGenerator(0, "sent", trial).distinct(9, space.bits))
            with space.corrupted(draw), space_there.corrupted(draw):
                assert torch.equal(there(x).view(torch.int32), net(x).view(torch.int32))


def test_a_copy_shares_nothing():
    net = quantised("int8")
    other = copy.deepcopy(net)
    space = FaultSpace(net)
    with space.corrupted(space.faults([("0.weight.qdata", 0, 7)])):
        assert not torch.equal(other[0].weight.qdata, net[0].weight.qdata)
        assert space.again(other).bits == space.bits


def test_what_would_decode_a_librarys_words_is_refused_in_a_sentence():
    net = quantised("int8")
    with pytest.raises(fp.errors.FormatError, match=r"0\.weight\.scale is part of 0\.weight, which a library reads"):
        fp.pack_(net, fp.Float16())
    with pytest.raises(fp.errors.FaultSpaceError, match=r"0\.weight\.qdata is stored as packed words or integers"):
        fp.analyze(net, data(net), fp.DeepVigor(), where=fp.Parameters())
    assert fp.scrub_(net, fp.BitClipped(fp.Float32(), zeros=(30,))) == 0  # scales and floats; words are not theirs
    words = net[0].weight.qdata.clone()
    packed = fp.pack_(net, fp.Affine(8))  # the one float weight
    assert torch.equal(packed[0].weight.qdata, words)
    assert packed[2].parametrizations.weight.original0.numel() == 96


class TestQuantised(SpaceContract):
    def network(self) -> nn.Module:
        net = quantised("int8")
        for module in net.modules():
            vars(module).pop("extra_repr", None)  # a partial function, which pickle does not take
        return net

    def space(self, network: nn.Module) -> Space:
        return FaultSpace(network, where=fp.Parameters(include="4"))

    def run(self, network: nn.Module) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return network(inputs())


class TestQuantisedAndCoded(TestQuantised):
    def space(self, network: nn.Module) -> Space:
        code = fp.SECDED(fp.Integer(8), block=32)
        return FaultSpace(network, where=fp.Parameters(include="4.weight.qdata"), format=code)
