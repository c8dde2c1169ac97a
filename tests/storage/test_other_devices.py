"""Codes decoded by tensor operations, as on devices that compiled kernels do not reach: clean blocks are skipped."""

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.formats import _block_codes, blocks, packing
from flipproof.formats._block_codes import LOST
from flipproof.spaces.contract import Faults

FORMATS = [
    fp.SECDED(fp.Rounded(fp.Float32(), 26)),
    fp.SECDED(fp.Affine(bits=8), block=64),
    fp.BCH(fp.Rounded(fp.Float16(), 11), t=5),
    fp.BCH(fp.Affine(5, axis=0), t=3, block=165),
    fp.BCH(fp.Affine(5, axis=0), t=14, block=385),
    fp.BCH(fp.Affine(6, axis=0), t=7),
]


@pytest.fixture
def no_kernels(monkeypatch):
    for module in (blocks, packing):
        monkeypatch.setattr(module, "in_reach", lambda tensor: False)


def stored_with_faults(format, rate):
    """(words as int64, blocks by words; the code) of whole blocks."""
    torch.manual_seed(0)
    count = 40 * format.together
    stored = format.encode(torch.randn(40, format.together))
    layout = format.layout(count)
    generator = np.random.default_rng(1)
    widths = layout.width(np.arange(count))
    masks = [sum(1 << b for b in range(width) if generator.random() < rate) for width in widths.tolist()]
    words = stored.words.reshape(-1).long() & ((1 << format.width) - 1)
    return (words ^ torch.tensor(masks)).reshape(40, format.together), format.code(format.together)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("rate", [0.0, 1e-3, 3e-2])
def test_they_agree_with_the_kernels_block_by_block(format, rate, monkeypatch):
    rows, code = stored_with_faults(format, rate)
    inner = np.zeros(rows.numel(), np.uint64)
    status = code.repair(rows.reshape(-1).numpy().view(np.uint64), inner)
    for chunk in (1 << 28, 1):  # all at once, and one block at a time
        monkeypatch.setattr(_block_codes, "CHUNK_BYTES", chunk)
        data, lost = code.mend_torch(rows)
        assert data.reshape(-1).tolist() == inner.tolist()
        assert lost.tolist() == (status == LOST).tolist()
        assert torch.equal(code.protect_torch(data), torch.cat([code.protect_torch(row[None]) for row in data]))


def test_clean_blocks_are_not_decoded(monkeypatch):
    rows, code = stored_with_faults(fp.BCH(fp.Affine(5, axis=0), t=3, block=165), 0.0)
    rows[[3, 17], 0] ^= 1
    decoded = []
    repair = code.repair_torch
    monkeypatch.setattr(type(code), "repair_torch", lambda self, some: decoded.append(len(some)) or repair(some))
    code.mend_torch(rows)
    assert decoded == [2]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_a_packed_model_computes_and_heals_alike(format, no_kernels, monkeypatch):
    found = []
    for reach in (False, True):
        if reach:
            monkeypatch.undo()
        torch.manual_seed(0)
        net = fp.pack_(nn.Linear(60, 50, bias=False), format)
        space = fp.FaultSpace(net)
        faults = Faults(np.flatnonzero(np.random.default_rng(2).random(space.bits) < 5e-3))
        with space.corrupted(faults):
            values = net.weight.clone()
            written = fp.scrub_(net)
            found.append((values, written, net.parametrizations.weight.original0.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] > 0
    assert torch.equal(found[0][2], found[1][2])


def test_memory_stays_bounded():
    """Eleven million words of a block code would be gigabytes as bits; what is taken at once is a chunk."""
    format = fp.SECDED(fp.Rounded(fp.Float32(), 26))
    code = format.code(1)
    parts = code._chunks(torch.empty(11_000_000, 1, dtype=torch.int64, device="meta"))
    assert sum(len(part) for part in parts) == 11_000_000
    assert max(len(part) for part in parts) * 32 * 64 <= 1 << 28


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_cuda_reads_heals_and_unpacks_as_the_cpu_does(format):
    torch.manual_seed(0)
    here = fp.pack_(nn.Linear(60, 50, bias=False), format)
    space = fp.FaultSpace(here)
    with space.corrupted(Faults(np.flatnonzero(np.random.default_rng(2).random(space.bits) < 5e-3))):
        torch.cuda.reset_peak_memory_stats()
        there = nn.Linear(60, 50, bias=False)
        there = fp.pack_(there, format)
        there.load_state_dict(here.state_dict())
        there.cuda()
        assert torch.equal(there.weight.cpu(), here.weight)
        assert fp.scrub_(there) == fp.scrub_(here) > 0
        assert torch.equal(there.parametrizations.weight.original0.cpu(), here.parametrizations.weight.original0)
        assert torch.equal(fp.unpack_(there).weight.cpu(), here.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_memory_stays_bounded():
    net = fp.pack_(nn.Linear(3000, 3600, bias=False), fp.SECDED(fp.Rounded(fp.Float32(), 26))).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    net.weight  # noqa: B018
    words = 3000 * 3600
    assert torch.cuda.max_memory_allocated() - before < words * 8 * 8 + (1 << 28)
