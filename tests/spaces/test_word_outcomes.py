"""How hit words are read: by hand, by a reader of whole tensors, and alike in simulated and packed memory."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flipproof as fp
from flipproof.campaigns.record import Trial
from flipproof.errors import ConfigError
from flipproof.formats.base import bit_pattern, dense
from flipproof.spaces.contract import Faults


def a_net(columns=32):
    torch.manual_seed(5)
    return nn.Linear(columns, 5, bias=False)


def both(net, format):
    """The space of a model whose memory is simulated, and that of one whose memory is packed."""
    return fp.FaultSpace(net, format=format), fp.FaultSpace(fp.pack_(copy.deepcopy(net), format))


def outcomes(space, hits, stuck=None):
    with space.corrupted(space.faults([("weight", value, bit) for value, bit in hits], stuck=stuck)):
        return tuple(space.word_outcomes)


# ------------------------------------------------------------------- by hand: (corrected, detected, miscorrected)


@pytest.mark.parametrize(
    ("format", "hits", "expected"),
    [
        (fp.SECDED(fp.Float32()), [], (0, 0, 0)),
        (fp.SECDED(fp.Float32()), [(3, 30)], (1, 0, 0)),
        (fp.SECDED(fp.Float32()), [(3, 38)], (1, 0, 0)),  # the parity itself
        (fp.SECDED(fp.Float32()), [(3, 30), (3, 2)], (0, 1, 0)),
        # columns 3, 5 and 6 of a Hamming code add up to nothing: the parity alone seems to be hit
        (fp.SECDED(fp.Float32()), [(3, 0), (3, 1), (3, 2)], (0, 0, 1)),
        (fp.SECDED(fp.Float32()), [(0, 1), (3, 30), (3, 2), (7, 0), (7, 1), (7, 2), (9, 9)], (2, 1, 1)),
        (fp.BCH(fp.Affine(5), 3), [(0, b) for b in (0, 7, 15)], (1, 0, 0)),
        (fp.BCH(fp.Affine(5), 3), [(0, b) for b in (0, 7, 9, 15)] + [(1, 1)], (1, 1, 0)),
        # a block of eight words counts once, whichever of its words are hit
        (fp.SECDED(fp.Affine(8), block=64), [(0, 0)], (1, 0, 0)),
        (fp.SECDED(fp.Affine(8), block=64), [(0, 0), (7, 3)], (0, 1, 0)),
        (fp.SECDED(fp.Affine(8), block=64), [(0, 0), (7, 3), (8, 1), (159, 8)], (2, 1, 0)),
        (fp.BCH(fp.Affine(5, axis=0), 14, block=385), [(v, 0) for v in range(14)], (1, 0, 0)),
        (fp.BCH(fp.Affine(5, axis=0), 14, block=385), [(v, 0) for v in range(15)], (0, 1, 0)),
        # 160 words are a block of 77 and one of 83, in which 16 faults are corrected
        (fp.BCH(fp.Affine(5, axis=0), 14, block=385), [(0, 0), *((v, 1) for v in range(77, 93))], (2, 0, 0)),
        (fp.BCH(fp.Affine(5, axis=0), 14, block=385), [(0, 0), *((v, 1) for v in range(77, 94))], (1, 1, 0)),
        (fp.Affine(8), [(0, 0), (0, 1), (4, 7)], (0, 0, 2)),
        (fp.Rounded(fp.Float16(), 11), [(0, 0), (0, 10), (4, 7)], (0, 0, 2)),
        (fp.BitClipped(fp.Float32(), zeros=30), [(0, 30), (1, 30), (1, 2), (2, 2)], (1, 0, 2)),
        (fp.TripleMSB(fp.Affine(3)), [(0, 2), (1, 3), (2, 2), (2, 3), (3, 0)], (2, 0, 2)),
        (fp.Parity(fp.Float32()), [(0, 3), (1, 32), (2, 4), (2, 5)], (0, 2, 1)),
        # bit 30 of a weight takes it out of range, bit 0 leaves it there; a bound is outvoted, or hit twice
        (fp.RangeChecked(fp.Float32()), [(1, 30), (2, 0), (160, 31)], (1, 1, 1)),
        (fp.RangeChecked(fp.Float32()), [(160, 31), (161, 31)], (0, 0, 2)),
        (fp.RangeChecked(fp.Float32()), [(160, 31), (161, 31), (163, 3)], (1, 0, 2)),
    ],
    ids=str,
)
def test_known_outcomes(format, hits, expected):
    net = a_net()
    for space in both(net, format):
        assert outcomes(space, hits) == expected


def test_plain_floats_are_misread_once_a_word_however_many_bits_flip():
    net = a_net()
    space = fp.FaultSpace(net)
    assert outcomes(space, [(3, b) for b in range(32)] + [(4, 0), (9, 31)]) == (0, 0, 3)
    assert outcomes(space, []) == (0, 0, 0)  # counted anew for each draw
    half = fp.FaultSpace(a_net().half())
    assert outcomes(half, [(0, 0), (0, 15), (1, 0), (2, 15)]) == (0, 0, 3)


def test_words_that_hold_the_stuck_value_already_are_not_hit():
    net = a_net()
    with torch.no_grad():
        net.weight.fill_(-1.0)  # 0xBF800000: bits 31, 29 to 23 are set
    assert outcomes(fp.FaultSpace(net), [(0, 31), (1, 29), (2, 30), (3, 0)], stuck=1) == (0, 0, 2)
    assert outcomes(fp.FaultSpace(net), [(0, 31), (0, 30), (1, 30), (1, 0), (2, 22)], stuck=0) == (0, 0, 1)
    for space in both(net, fp.SECDED(fp.Float32())):
        assert outcomes(space, [(0, 31), (1, 29), (2, 30), (3, 0), (3, 1), (3, 31)], stuck=1) == (1, 1, 0)
    for space in both(net, fp.RangeChecked(fp.Float32())):
        assert outcomes(space, [(0, 31), (1, 30), (160, 31), (161, 0)], stuck=1) == (1, 1, 0)


def test_a_block_that_reads_as_before_though_it_is_lost_counts_as_corrected():
    net = a_net()
    with torch.no_grad():
        net.weight.zero_()
    for space in both(net, fp.SECDED(fp.Float32())):
        assert outcomes(space, [(0, 3), (0, 4), (1, 1)]) == (2, 0, 0)


def test_plain_and_coded_tensors_of_one_model_are_counted_together():
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    format = {"weight": fp.SECDED(fp.Float32())}
    packed = fp.pack_(copy.deepcopy(net), format)
    for space in (fp.FaultSpace(net, format=format), fp.FaultSpace(packed)):
        hits = [("weight", 0, 1), ("weight", 3, 1), ("weight", 3, 2), ("bias", 0, 4), ("bias", 0, 5), ("bias", 2, 1)]
        with space.corrupted(space.faults(hits)):
            assert space.word_outcomes == (1, 1, 2)


# ------------------------------------------------------------------- by a reader of whole tensors

FORMATS = [
    fp.Float32(),
    fp.Affine(5),
    fp.SECDED(fp.Float32()),
    fp.SECDED(fp.Rounded(fp.Float32(), 26)),
    fp.SECDED(fp.Affine(8), block=64),
    fp.BCH(fp.Rounded(fp.Float16(), 11), 5),
    fp.BCH(fp.Affine(5, axis=0), 3),
    fp.BCH(fp.Affine(5, axis=0), t=14, block=385),
    fp.BCH(fp.Affine(4), 2, block=64, parity=False),
    fp.Rounded(fp.Affine(8), 5),
    fp.RangeChecked(fp.Float32()),
    fp.RangeChecked(fp.Float32(), per="channel"),
    fp.RangeChecked(fp.FixedPoint(3, 12), copies=1),
    fp.RangeChecked(fp.SECDED(fp.Float16())),
    fp.RangeChecked(fp.Affine(5, axis=0), per="channel"),
    fp.BitClipped(fp.Float32(), zeros=(30,)),
    fp.TripleMSB(fp.Affine(4)),
    fp.Parity(fp.BitClipped(fp.Float16(), zeros=(14,))),
]


def brute(format, x, hit, stuck):
    """Every word is changed and the whole tensor read again: how many of the hit words are read how."""
    stored = format.encode(x)
    own, shape = format.stored_constants, stored.words.shape
    constants = format.write_constants(stored.coding) if own else stored.words.reshape(-1)[:0]
    line = torch.cat([stored.words.reshape(-1), constants])
    layout = format.layout(line.numel())
    values, bits = layout.locate(hit)
    masks = torch.zeros(line.numel(), dtype=torch.int64)
    for value, bit in zip(values.tolist(), bits.tolist(), strict=True):
        masks[value] |= 1 << bit
    masks = masks.to(line.dtype)
    after = line ^ masks if stuck is None else line | masks if stuck else line & ~masks
    coding = format.read_constants(after[x.numel() :], stored.coding[own:]) if own else stored.coding
    golden = stored.decode()
    read, lost = format.read(after[: x.numel()].reshape(shape), dense(coding, shape), x.dtype)
    differs = (bit_pattern(read) != bit_pattern(golden)).reshape(-1)
    lost = torch.zeros_like(differs) if lost is None else lost.reshape(-1)
    changed = (line != after)[: x.numel()]
    together = format.together
    count = [0, 0, 0]
    borders = [*range(0, x.numel() - together + 1, together)]
    for first, last in zip(borders, [*borders[1:], x.numel()], strict=True):
        if bool(changed[first:last].any()):
            wrong, seen = bool(differs[first:last].any()), bool(lost[first:last].any())
            count[0 if not wrong else 1 if seen else 2] += 1
    flat = [torch.stack([c.reshape(-1) for c in part[:own]]) for part in (coding, stored.coding)] if own else []
    for word in torch.nonzero(line != after).reshape(-1).tolist():
        if word >= x.numel():  # entry by entry, copy by copy, slice by slice
            slices = flat[0].shape[1]
            entry, slice_ = (word - x.numel()) // (constants.numel() // own), (word - x.numel()) % slices
            count[2 if flat[0][entry, slice_] != flat[1][entry, slice_] else 0] += 1
    blocks = {
        min(v // together, max(x.numel() // together - 1, 0)) for v in torch.nonzero(changed).reshape(-1).tolist()
    }
    assert sum(count) == len(blocks) + int((line != after)[x.numel() :].sum())
    return read, tuple(count)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 1]), st.sampled_from([2, 30, 200, 900]))
def test_words_are_read_as_by_reading_everything(format, seed, stuck, hits):
    net = a_net()
    x = net.weight.detach().clone()
    for space, model in zip(both(net, format), (net, None), strict=True):
        hit = np.sort(np.random.default_rng(seed).permutation(space.bits)[:hits])
        read, expected = brute(format, x, hit, stuck)
        with space.corrupted(Faults(hit, stuck)):
            if model is not None:
                now = model.weight.detach()
                nan = torch.isnan(read)
                assert torch.equal(torch.isnan(now), nan)
                assert torch.equal(bit_pattern(now)[~nan], bit_pattern(read)[~nan])
            assert tuple(space.word_outcomes) == expected
    assert torch.equal(net.weight, x)


# ------------------------------------------------------------------- campaigns


def two_layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 90), nn.ReLU(), nn.Linear(90, 3))


def some_data():
    torch.manual_seed(2)
    x = torch.randn(24, 4)
    return [(x, two_layers()(x).argmax(dim=1))]


CAMPAIGNS = [
    *({"*.weight": format} for format in FORMATS[1:]),
    {"0.weight": fp.BCH(fp.Affine(5, axis=0), t=14, block=385), "2.weight": fp.RangeChecked(fp.SECDED(fp.Float16()))},
    {"0.*": fp.RangeChecked(fp.Float32(), per="channel"), "2.*": fp.BCH(fp.Rounded(fp.Float16(), 11), 5)},
]


@pytest.mark.parametrize("format", CAMPAIGNS, ids=repr)
@pytest.mark.parametrize(
    "faults", [fp.BitErrorRate([1e-3, 3e-2]), fp.StuckAt(0.05, 0), fp.StuckAt(0.05, 1), fp.BitPosition(3)], ids=repr
)
def test_the_same_records_from_simulated_and_from_packed_memory(format, faults):
    net, data = two_layers(), some_data()
    packed = fp.pack_(copy.deepcopy(net), format)
    before = {name: buffer.clone() for name, buffer in packed.state_dict().items()}
    simulated = fp.assess(net, data, faults=faults, format=format, trials=5)
    real = fp.assess(packed, data, faults=faults, trials=5)
    assert simulated.bits == real.bits
    assert simulated.golden == real.golden
    for ours, theirs in zip(simulated.records, real.records, strict=True):
        one, other = ours.to_json(), theirs.to_json()
        assert one.pop("seconds") > 0 < other.pop("seconds")
        assert json.dumps(one) == json.dumps(other)
    hit = simulated.trials[["corrected", "detected", "miscorrected"]].sum(axis=1)
    assert (hit > 0).all()
    assert (hit <= simulated.trials["flips"]).all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in packed.state_dict().items())


def test_the_summary_has_means_a_trial():
    found = fp.assess(
        two_layers(), some_data(), faults=fp.RandomBits([1, 60]), format={"*": fp.SECDED(fp.Affine(5))}, trials=8
    )
    for name in ("corrected", "detected", "miscorrected"):
        means = found.trials.groupby("point")[name].mean()
        assert found.summary[name].tolist() == means.tolist()
    assert found.trials["corrected"].tolist()[:8] == [1] * 8  # one flip a trial
    assert found.summary["detected"].iloc[1] > 0


def test_neurons_hold_no_words(tmp_path):
    found = fp.assess(
        two_layers(),
        some_data(),
        faults=fp.RandomBits(1),
        where=fp.Neurons(),
        trials=3,
        journal=tmp_path / "neurons.jsonl",
    )
    assert [record.words for record in found.records] == [None] * 3
    for name in ("corrected", "detected", "miscorrected"):
        assert found.trials[name].isna().all()
        assert math.isnan(found.summary[name][0])
    assert [record.words for record in fp.Assessment.load(tmp_path / "neurons.jsonl").records] == [None] * 3


def test_records_keep_what_became_of_words(tmp_path):
    path = tmp_path / "run.jsonl"
    setup = {"faults": fp.RandomBits(40), "format": {"*": fp.SECDED(fp.Affine(5))}, "trials": 4}
    found = fp.assess(two_layers(), some_data(), journal=path, **setup)
    assert fp.Assessment.load(path).trials.equals(found.trials)
    for record in found.records:
        assert Trial.from_json(json.loads(json.dumps(record.to_json()))) == record
    # a journal of before: a line a record, which says nothing of words
    old = [found.header.to_json() | {"flipproof_journal": 1}, *(record.to_json() for record in found.records)]
    lines = []
    for line in old:
        record = {name: value for name, value in line.items() if name != "words"}
        record |= {name: without(value) for name, value in record.items() if isinstance(value, dict)}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    assert "miscorrected" not in path.read_text()
    again = fp.Assessment.load(path)
    assert [record.words for record in again.records] == [None] * 4
    assert again.trials["corrected"].isna().all()
    assert math.isnan(again.summary["corrected"][0])
    assert again.trials["accuracy"].equals(found.trials["accuracy"])


def without(record):
    return {name: value for name, value in record.items() if name != "words"}


@pytest.mark.parametrize("words", [{"corrected": 1}, {"corrected": 1, "detected": 0, "miscorrected": -1}, 3, [1, 2, 3]])
def test_records_with_other_counts_are_refused(words):
    found = fp.assess(two_layers(), some_data(), faults=fp.RandomBits(1), trials=1)
    record = found.records[0].to_json()
    assert record["words"] == {"corrected": 0, "detected": 0, "miscorrected": 1}
    with pytest.raises(ConfigError, match=r"words|detected|miscorrected"):
        Trial.from_json(record | {"words": words})
