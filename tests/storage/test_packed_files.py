import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, ModelError

FORMATS = {"0.weight": fp.BCH(fp.Affine(bits=5, axis=0), t=3), "2.*": fp.SECDED(fp.Rounded(fp.Float32(), bits=26))}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()


@pytest.fixture
def file(tmp_path):
    return fp.save_packed(fp.pack_(network(), FORMATS), tmp_path / "deep" / "words.safetensors")


def test_words_come_back_bit_by_bit_and_faults_with_them(tmp_path):
    words = fp.pack_(network(), FORMATS)
    words[0].parametrizations.weight.original0[3] ^= 0b101
    again = fp.load_packed(network(), fp.save_packed(words, tmp_path / "w.safetensors"))
    for (name, a), (other, b) in zip(words.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x = torch.randn(4, 6)
    assert torch.equal(words(x), again(x))
    assert fp.FaultSpace(again).bits == fp.FaultSpace(words).bits


def test_the_model_that_gives_the_code_stays_as_it_was(file):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fp.load_packed(net, file)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not hasattr(net[0], "parametrizations")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_the_model_held_before_does_not_matter(file, value):
    net = network()
    with torch.no_grad():
        net[0].weight[0, 0] = value
    again, expected = fp.load_packed(net, file), fp.load_packed(network(), file)
    assert torch.equal(again[0].weight, expected[0].weight)
    assert not torch.isfinite(net[0].weight).all()


@pytest.mark.parametrize("path", [None, "", 3])
def test_a_file_to_write_is_a_path(path):
    with pytest.raises(ConfigError, match="takes a path"):
        fp.save_packed(fp.pack_(network(), FORMATS), path)


def test_nothing_packed_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no parameter of this Sequential is packed"):
        fp.save_packed(network(), tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about | {"version": 99}, "version 99"),
        (lambda about: about | {"formats": about["formats"] | {"0.weight": "os.system('true')"}}, "os.system"),
        (lambda about: about | {"formats": {"nowhere": "Float32()"}}, "nowhere"),
        (lambda about: about | {"formats": 3}, "formats"),
        (lambda about: about | {"more": 1}, "more"),
        (lambda about: {"version": 1}, "formats"),
    ],
)
def test_damaged_metadata_is_refused(file, change, message, tmp_path):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["flipproof_packed"])
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(file), bad, {"flipproof_packed": json.dumps(change(about))})
    with pytest.raises((ConfigError, ModelError), match=message):
        fp.load_packed(network(), bad)


def test_other_files_and_models_are_refused(file, tmp_path):
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ConfigError, match=r"cannot be read as a file of fp\.save_packed"):
        fp.load_packed(network(), tmp_path / "text")
    with pytest.raises(ConfigError, match=r"cannot be read as a file of fp\.save_packed"):
        fp.load_packed(network(), tmp_path / "missing")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"not written by fp\.save_packed"):
        fp.load_packed(network(), tmp_path / "plain")
    wider = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(ModelError, match=r"0\.parametrizations\.weight\.original0: the model has"):
        fp.load_packed(wider, file)
    with pytest.raises(ModelError, match=r"0\.weight"):
        fp.load_packed(nn.Linear(2, 2), file)
