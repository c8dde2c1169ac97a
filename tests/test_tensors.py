"""Bits of tensors are compared as NumPy compares their bytes, wherever they lie."""

from __future__ import annotations

import pytest
import torch

import flipproof as fp
from flipproof._tensors import same_bits

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 9, 64, 1001])
def test_one_bit_anywhere_is_seen(dtype, size):
    torch.manual_seed(0)
    memory = torch.randint(0, 2 if dtype is torch.bool else 256, (16 * 1100,), dtype=torch.uint8).view(dtype)
    for start in range(4):
        one, other = memory[start : start + size], memory.clone()[start : start + size]
        assert same_bits(one, other)
        assert same_bits(one, other.clone())  # elsewhere in memory
        for at in {0, size // 2, size - 1} if size else ():
            changed = one.clone()
            changed.view(torch.uint8)[at * one.element_size()] ^= 1
            assert not same_bits(one, changed)
            assert not same_bits(changed, other)


def test_zeros_have_signs_and_a_nan_is_itself():
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_layouts_do_not_matter():
    one = torch.randn(4, 6, 5, 3)
    laid = one.contiguous(memory_format=torch.channels_last)
    assert same_bits(one, laid)
    assert same_bits(one[1:, ::2].mT, laid[1:, ::2].mT)
    assert same_bits(torch.tensor(3), torch.tensor(3))


class Versioned(torch.nn.Sequential):
    """Refuses a state without its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_that_note_a_version_are_loaded(tmp_path):
    torch.manual_seed(0)
    net = Versioned(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(40, 4)
    safe = fp.harden(net, [(x, net(x).argmax(dim=1))], fp.Ranger(), progress=False)
    again = fp.load_hardened(net, fp.save_hardened(safe, tmp_path / "safe"))
    assert torch.equal(again(x), safe(x))
    words = fp.pack_(Versioned(torch.nn.Linear(4, 8)), fp.Affine(8))
    loaded = fp.load_packed(Versioned(torch.nn.Linear(4, 8)), fp.save_packed(words, tmp_path / "words"))
    assert torch.equal(loaded(x), words(x))
