"""The compiled pass over words of formats against torch's own encoding and decoding, bit by bit."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flipproof as fp
from flipproof.formats.base import bit_pattern
from flipproof.spaces import cell as cells
from flipproof.spaces.contract import Faults
from flipproof.spaces.words import Lookup

FORMATS = [
    fp.Affine(8), fp.Affine(3), fp.Affine(8, axis=0), fp.Affine(5, axis=0), fp.Symmetric(8), fp.Symmetric(4, axis=0),
    fp.Symmetric(8, largest=63), fp.FixedPoint(), fp.FixedPoint(3, 4), fp.FixedPoint(3, 12), fp.FixedPoint(7, 12),
    fp.FixedPoint(1, 0), fp.FixedPoint(rounding="truncate"), fp.Float16(), fp.BFloat16(), fp.Float8E4M3(),
    fp.Float8E5M2(), fp.Rounded(fp.Float16(), 11), fp.Rounded(fp.Affine(8), 5), fp.TripleMSB(fp.Affine(3)),
    fp.TripleMSB(fp.Affine(6, axis=0)), fp.Parity(fp.Affine(8)), fp.SECDED(fp.Affine(8, axis=0)),
    fp.BitClipped(fp.Float16(), zeros=(14,)),
]  # fmt: skip


def network(scale=1.0):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3))
    with torch.no_grad():
        net[0].weight.mul_(scale)
        net[3].weight[0] = 0.25  # a channel without spread
    return net


def spaces(net, format, monkeypatch):
    """The same model twice: one whose words go through the compiled pass, and one where torch does all."""
    compiled, slow = fp.FaultSpace(net, format=format), fp.FaultSpace(copy.deepcopy(net), format=format)
    return compiled, slow, lambda: monkeypatch.setattr(cells, "_reading_of", lambda *_: None)


def patterns(space):
    """All bits; a NaN is one NaN, since torch itself quiets it or not with the number of values that it decodes."""
    values = [cell.tensor.data for cell in space.cells]
    return [bit_pattern(torch.where(torch.isnan(v), torch.nan, v)) for v in values]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("chosen", FORMATS, ids=repr)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([1e-3, 0.02, 0.5, 0.98]), stuck=st.sampled_from([None, 0, 1]))
def test_memory_counts_and_outcomes_are_those_of_torch(chosen, seed, share, stuck):
    net, everywhere = network(), {"*": chosen}
    with pytest.MonkeyPatch.context() as patch:
        quick, slow, turn_off = spaces(net, everywhere, patch)
        positions = fp.faults.TrialGenerator(seed, "p", 0).distinct(max(1, round(share * quick.bits)), quick.bits)
        faults = Faults(positions, stuck)
        with quick.stored():
            assert not quick._paths()[1], "torch decodes something here"
            turn_off()
            with slow.stored():
                assert slow._paths()[0] is None, "the twin is compiled too"
                before = patterns(quick)
                assert same(before, patterns(slow))
                with quick.corrupted(faults) as changed, slow.corrupted(faults) as expected:
                    assert changed == expected
                    assert same(patterns(quick), patterns(slow))
                    assert quick.word_outcomes == slow.word_outcomes
                    assert quick.as_stored == slow.as_stored
                assert same(before, patterns(quick))


def test_every_word_that_a_fault_can_make_is_read_as_torch_reads_it():
    """All 256 masks on every value of a layer, for words that are computed and words that are looked up."""
    for chosen in (fp.Affine(8), fp.Affine(8, axis=0), fp.Symmetric(8), fp.FixedPoint(3, 4), fp.Float8E5M2()):
        net = nn.Linear(9, 4, bias=False)
        space = fp.FaultSpace(net, format=chosen)
        original = net.weight.detach().clone()
        stored = chosen.encode(original)
        with space.stored():
            for mask in range(256):
                bits = [("weight", v, b) for v in range(36) for b in range(8) if mask >> b & 1]
                with space.corrupted(space.faults(bits)):
                    expected = chosen.decode_words(
                        (stored.words ^ mask).to(stored.words.dtype),
                        tuple(c.reshape(-1, 1) if c.dim() else c for c in stored.coding),
                        torch.float32,
                    )
                    assert torch.equal(bit_pattern(net.weight.data), bit_pattern(expected)), (chosen, mask)


class Lying(fp.Affine):
    """Says that its words are read as another format's."""

    def linear(self, coding):
        return fp.Affine.linear(self, (coding[0], coding[1] + 1))


def test_what_a_format_says_of_its_words_is_believed_only_where_it_is_so():
    torch.manual_seed(0)
    net = nn.Linear(40, 2, bias=False)
    with pytest.MonkeyPatch.context() as patch:
        quick, slow, turn_off = spaces(net, Lying(8), patch)
        with quick.stored():
            assert isinstance(quick.cells[0].stretch.reading, Lookup)
            turn_off()
            with slow.stored():
                for bit in range(quick.bits):
                    faults = Faults(np.array([bit]))
                    with quick.corrupted(faults), slow.corrupted(faults):
                        assert same(patterns(quick), patterns(slow))
                        assert quick.word_outcomes == slow.word_outcomes


def test_where_float32_has_fewer_values_than_there_are_words():
    """Between a million and a million and one."""
    net = nn.Linear(40, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(1e6 + torch.linspace(0, 1, 80).reshape(2, 40))
    with pytest.MonkeyPatch.context() as patch:
        quick, slow, turn_off = spaces(net, fp.Affine(8), patch)
        with quick.stored():
            turn_off()
            with slow.stored():
                for bit in range(quick.bits):
                    faults = Faults(np.array([bit]))
                    with quick.corrupted(faults), slow.corrupted(faults):
                        assert same(patterns(quick), patterns(slow))
                        assert quick.word_outcomes == slow.word_outcomes


def test_special_values_are_flipped_as_torch_flips_them():
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 6e-8, 65504.0, 3e38]
    net = nn.Linear(len(special), 1, bias=False)
    for chosen in (fp.BFloat16(), fp.Float8E5M2(), fp.Float8E4M3()):
        with torch.no_grad():
            net.weight.copy_(torch.tensor([special]))
            if chosen != fp.BFloat16():
                net.weight[0, -2:] = 1.0  # beyond their range
                if chosen == fp.Float8E4M3():
                    net.weight[0, 1:3] = 2.0
        with pytest.MonkeyPatch.context() as patch:
            quick, slow, turn_off = spaces(net, chosen, patch)
            with quick.stored():
                turn_off()
                with slow.stored():
                    for bit in range(quick.bits):
                        with quick.corrupted(Faults(np.array([bit]))), slow.corrupted(Faults(np.array([bit]))):
                            assert same(patterns(quick), patterns(slow)), (chosen, bit)
                            assert quick.word_outcomes == slow.word_outcomes


def test_faults_within_faults_are_taken_out_in_turn():
    net = network()
    space = fp.FaultSpace(net, format=fp.Affine(8))
    first, second = (fp.RandomBits(40).draw(space, fp.faults.TrialGenerator(s, "p", 0)) for s in (1, 2))
    with space.stored():
        golden = patterns(space)
        with space.corrupted(first):
            once = patterns(space)
            with space.corrupted(second):
                assert not same(once, patterns(space))
            assert same(once, patterns(space))
        assert same(golden, patterns(space))
