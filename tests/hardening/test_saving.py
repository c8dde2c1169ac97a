from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.errors import ConfigError, ModelError
from flipproof.hardening import Hardening, Saturate, hardening_report

METHODS: list[Hardening] = [
    fp.Ranger(),
    fp.Ranger(per="neuron", replace="zero"),
    fp.ProAct(epochs=1, epochs_last=1, held_out=0.5),
    fp.Guard(),
]


class Tokens(nn.Module):
    """Integer inputs in a dict, functional activations with and without a lower bound, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.one, self.two = (
            nn.Embedding(5, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 6),
            nn.Linear(6, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm(self.embed(tokens).mean(dim=1)))
        return self.two(torch.relu(self.one(x)))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [({"tokens": torch.randint(5, (20, 7), generator=generator)}, torch.arange(20) % 3) for _ in range(2)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_comes_back_bit_for_bit(method, data, tmp_path):
    model = Tokens()
    safe = fp.harden(model, method, data=data)
    path = fp.save_hardened(safe, tmp_path / "new" / "safe.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = Tokens()  # other weights: those of the file count
    again = fp.load_hardened(other, path)
    assert again.state_dict().keys() == safe.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in safe.state_dict().items())
    for inputs, _ in data:
        assert torch.equal(again.eval()(**inputs), safe.eval()(**inputs))
    assert hardening_report(again).table().equals(hardening_report(safe).table())
    assert hardening_report(again).method == hardening_report(safe).method
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["safe.safetensors"]


def test_the_same_campaign_runs_on_it(data, tmp_path):
    safe = fp.harden(Tokens(), fp.Guard(), data=data).eval()
    again = fp.load_hardened(Tokens(), fp.save_hardened(safe, tmp_path / "s.safetensors")).eval()
    setup = {"data": data, "faults": fp.BitErrorRate([1e-2]), "trials": 5}
    one, two = (fp.assess(m, **setup).trials.drop(columns="seconds") for m in (safe, again))
    assert one.equals(two)


def test_another_network_is_refused(data, tmp_path):
    path = fp.save_hardened(fp.harden(Tokens(), fp.Guard(), data=data), tmp_path / "s.safetensors")

    class Wider(Tokens):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(self.norm(self.embed(tokens).mean(dim=1)))))

    with pytest.raises(ModelError, match="which this Wider does not have"):
        fp.load_hardened(Wider(), path)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a hardened model that flipproof wrote"):
        fp.load_hardened(Tokens(), tmp_path / "f.safetensors")
    with pytest.raises(ConfigError, match="is not a hardened model"):
        fp.load_hardened(Tokens(), tmp_path / "absent.safetensors")


def test_what_a_file_cannot_hold_is_refused(data, tmp_path):
    with pytest.raises(ModelError, match="was not hardened by flipproof"):
        fp.save_hardened(Tokens(), tmp_path / "x.safetensors")

    class Own(Saturate):
        pass

    safe = fp.harden(Tokens(), fp.Ranger(), data=data)
    site = hardening_report(safe).sites[0]
    safe.get_submodule(site.module).__class__ = Own
    with pytest.raises(ModelError, match="is bounded by a Own"):
        fp.save_hardened(safe, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
