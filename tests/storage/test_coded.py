"""Models that a library has quantised: coded where they are stored, repaired when they are loaded."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, FlipproofWarning, FormatError, ModelError
from flipproof.formats import Integer
from flipproof.spaces.tensors import inventory
from flipproof.storage.budget import kept_by


class Gptq(nn.Module):
    """A linear layer 64 → 16 in GPTQ's layout: eight codes of 4 bits an int32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (8, 16), dtype=torch.int32))
        self.register_buffer("qzeros", torch.full((1, 2), 0x77777777, dtype=torch.int32))
        self.register_buffer("scales", torch.rand(1, 16) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(0, 32, 4)
        codes = ((self.qweight[:, None, :] >> places[None, :, None]) & 15).reshape(64, 16)
        zeros = ((self.qzeros[:, :, None] >> places) & 15).reshape(1, 16) + 1
        return x @ ((codes - zeros).float() * self.scales)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 6)).eval()


def torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    net = mlp()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def dynamic() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


def gptq() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Gptq(), nn.ReLU(), nn.Linear(16, 6)).eval()


LIBRARIES = {"torchao": torchao, "torch.ao": dynamic, "GPTQ": gptq}


def batches(net):
    torch.manual_seed(2)
    return [(x, net(x).argmax(dim=1)) for x in torch.randn(80, 64).split(10)]


def bits_of(net):
    return {c.name: c.tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone() for c in inventory(net)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("library", LIBRARIES)
def test_protect_codes_what_a_library_has_quantised(library, tmp_path):
    net = LIBRARIES[library]()
    data, before = batches(net), bits_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipproofWarning)
        safe = fp.protect(net, data, ber=2e-3, memory=0.6, trials=4, front=0, gate=False)
    assert same(bits_of(net), before)
    assert same(bits_of(safe.model), before)
    assert set(safe.formats) == set(safe.at_load) == set(before)
    assert safe.verdict == "met"
    assert safe.certain > 0.99
    forms = safe.evidence.set_index("form")
    assert forms.loc["protected", "memory"] <= 0.6
    assert forms.loc["protected", "accuracy"] == forms.loc["protected", "clean"] == 1.0
    assert forms.loc["as it came", "miscorrected"] > 0
    assert 0 < forms.loc["SECDED (72, 64) around the words", "memory"] < 0.3
    # what is charged is what the file takes, but for its constants
    safe.save(tmp_path)
    with safe_open(tmp_path / "coded.safetensors", "pt") as file:
        assert 8 * sum(file.get_tensor(name).numel() for name in file.keys()) == safe.table["bits"].sum()  # noqa: SIM118
    assert not (tmp_path / "words.safetensors").exists()
    other = LIBRARIES[library]()
    for candidate in inventory(other):  # another network of this structure
        candidate.tensor.data.copy_(candidate.tensor.data.flip(0))
    again = fp.load_coded(other, tmp_path / "coded.safetensors")
    assert same(bits_of(again), before)
    assert all(torch.equal(again(x), net(x)) for x, _ in data)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_file_that_lost_bits_is_repaired_up_to_what_its_codes_correct(library, tmp_path):
    net = LIBRARIES[library]()
    formats = {c.name: fp.BCH(kept_by(c.tensor), t=2) for c in inventory(net)}
    path = fp.save_coded(net, tmp_path / "coded.safetensors", formats)

    def damaged(faults):
        """The same file with so many random flips in each word of each tensor."""
        rng = np.random.default_rng(faults)
        with safe_open(path, "pt") as file:
            about = file.metadata()
            state = {name: file.get_tensor(name).numpy().copy() for name in file.keys()}  # noqa: SIM118
        for name, stream in state.items():
            width = formats[name].width
            stored = np.unpackbits(stream, bitorder="little")
            for first in range(0, stored.size - width + 1, width):
                stored[first + rng.choice(width, faults, replace=False)] ^= 1
            state[name] = np.packbits(stored, bitorder="little")
        save_file({name: torch.from_numpy(stream) for name, stream in state.items()}, tmp_path / "hit", about)
        return tmp_path / "hit"

    for faults in (1, 2):
        assert same(bits_of(fp.load_coded(net, damaged(faults))), bits_of(net))
    with pytest.warns(FlipproofWarning, match=r"beyond repair read as 0: .*\(\d"):
        lost = fp.load_coded(net, damaged(3))
    assert not same(bits_of(lost), bits_of(net))


def test_what_is_loaded_is_what_the_campaign_simulated():
    """A form of `assess` and a file with the same flips read alike, word by word."""
    net = torchao()
    formats = {c.name: fp.SECDED(kept_by(c.tensor)) for c in inventory(net)}
    space = fp.FaultSpace(net, format=formats)
    with space.stored():
        for trial in range(5):
            draw = fp.BitErrorRate(0.02).draw(space, fp.faults.TrialGenerator(0, "coded", trial))
            with space.corrupted(draw):
                simulated = bits_of(net)
            for site in space.sites:
                here = draw.positions[(draw.positions >= site.offset) & (draw.positions < site.offset + site.bits)]
                (candidate,) = (c for c in inventory(net) if c.name == site.name)
                words = site.format.encode_values(candidate.tensor, ())
                flat = words.reshape(-1).numpy().view(f"u{words.element_size()}")
                for position in (here - site.offset).tolist():
                    flat[position // site.width] ^= flat.dtype.type(1 << position % site.width)
                values, _ = site.format.read(words, (), candidate.tensor.dtype)
                assert torch.equal(values.contiguous().reshape(-1).view(torch.uint8), simulated[site.name])


def test_narrow_integers_hold_wide_tensors_whose_values_fit():
    wide = torch.tensor([-128, 0, 127], dtype=torch.int64)
    stored = Integer(8).encode(wide)
    assert torch.equal(stored.decode(), wide)
    assert stored.words.dtype == torch.uint8
    with pytest.raises(FormatError, match="does not hold 128"):
        Integer(8).encode(torch.tensor([3, 128]))
    assert not Integer(8).stores(torch.uint8)
    assert kept_by(torch.tensor([2**40])) is None
    assert kept_by(torch.tensor([0.25], dtype=torch.float64)) == fp.Float32()


def test_a_tensors_own_name_comes_before_that_of_what_holds_it():
    """torch.ao calls a weight as it calls its layer: "0.weight" and "0.weight.scale" are two tensors."""
    net = dynamic()
    formats = {"0.weight": fp.BCH(Integer(8), t=1), "0.weight.scale": fp.BCH(fp.Float32(), t=2)}
    found = {site.name: site.format for site in fp.FaultSpace(net, format=formats).sites}
    assert found["0.weight.scale"] == formats["0.weight.scale"]
    assert found["0.weight.zero_point"] == formats["0.weight"]  # which holds it, and stores it


def test_bad_input(tmp_path):
    net = nn.Linear(4, 2)
    with pytest.raises(ModelError, match="no tensor 'wieght'"):
        fp.save_coded(net, tmp_path / "a", {"wieght": fp.Float32()})
    with pytest.raises(FormatError, match=r"weight: .* does not give back the bits"):
        fp.save_coded(net, tmp_path / "a", {"weight": fp.Float16()})
    with pytest.raises(FormatError, match="needs constants"):
        fp.save_coded(net, tmp_path / "a", {"weight": fp.Affine(8)})
    assert not (tmp_path / "a").exists()
    path = fp.save_coded(net, tmp_path / "a", {"weight": fp.BCH(fp.Float32(), t=1)})
    with pytest.raises(ModelError, match="the model has"):
        fp.load_coded(nn.Linear(5, 2), path)
    with pytest.raises(ModelError, match="no tensor 'weight'"):
        fp.load_coded(nn.ReLU(), path)
    with pytest.raises(ConfigError, match="cannot be read"):
        fp.load_coded(net, tmp_path / "nothing")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"not written by fp\.save_coded"):
        fp.load_coded(net, tmp_path / "other")
    about = {"version": 1, "formats": {"bias": "Float32()"}}
    save_file({"weight": torch.zeros(3)}, tmp_path / "mixed", {"flipproof_coded": json.dumps(about)})
    with pytest.raises(ConfigError, match="are not those of the formats"):
        fp.load_coded(net, tmp_path / "mixed")
    for wrong in ("__import__('os')", "Float32().encode", "Unknown()"):
        about = {"version": 1, "formats": {"weight": wrong}}
        save_file(
            {"weight": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "code", {"flipproof_coded": json.dumps(about)}
        )
        with pytest.raises(fp.FlipproofError):
            fp.load_coded(net, tmp_path / "code")


def test_packed_files_say_what_writes_quantised_numbers(tmp_path):
    net = fp.pack_(torchao(), {"0.bias": fp.Float16()})
    with pytest.raises(ModelError, match=r"fp\.save_coded"):
        fp.save_packed(net, tmp_path / "words")
