import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.spaces.contract import Faults

WBC = fp.BitClipped(fp.Float32(), zeros=(30,))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.out = nn.Linear(6, 20, bias=False)
        self.out.weight = self.embed.weight
        nn.init.uniform_(self.embed.weight, -1, 1)


def bits_of(model):
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


@pytest.mark.parametrize("build", [lambda: nn.Linear(90, 70), Tied, lambda: nn.LSTM(5, 7, num_layers=2)])
def test_every_flip_of_the_clipped_bit_is_repaired_and_counted(build):
    torch.manual_seed(0)
    model = build()
    before = bits_of(model)
    values = sum(b.numel() for b in before)
    places = torch.randperm(values)[: values // 7]
    flat = torch.cat([b.reshape(-1) for b in before])
    flat[places] ^= 1 << 30
    with torch.no_grad():
        for p, part in zip(model.parameters(), flat.split([b.numel() for b in before]), strict=True):
            p.view(torch.int32).copy_(part.view(p.shape))
    assert fp.scrub_(model, WBC) == len(places)
    assert all(torch.equal(a, b) for a, b in zip(bits_of(model), before, strict=True))
    assert fp.scrub_(model, WBC) == 0


def test_it_computes_what_a_campaign_with_the_format_computes():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)), torch.randn(8, 6)
    plain, clipped = fp.FaultSpace(model), fp.FaultSpace(model, format=WBC)
    for trial in range(20):
        places = torch.randperm(plain.bits, generator=torch.Generator().manual_seed(trial))[:100].sort().values
        faults = plain.faults(plain.places(Faults(places.numpy())))
        with clipped.corrupted(faults):
            expected = model(x)
        before = bits_of(model)
        with plain.corrupted(faults):
            saved = {name: p.detach().clone() for name, p in model.named_parameters()}
            fp.scrub_(model, WBC)
            assert torch.equal(model(x).isnan(), expected.isnan())
            assert torch.equal(model(x).nan_to_num(), expected.nan_to_num())
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(saved[name])
        assert all(torch.equal(a, b) for a, b in zip(bits_of(model), before, strict=True))


def test_other_types_layouts_and_parts_of_a_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.view(torch.int16)[0, 0] ^= 1 << 14
        model[1].weight.view(torch.int16)[0, 0] ^= 1 << 14
    format = fp.BitClipped(fp.BFloat16(), zeros=(14,))
    assert fp.scrub_(model, format, where=fp.Parameters(include="0")) == 1
    assert fp.scrub_(model, format) == 1
    other = nn.Linear(4, 3)
    other.weight = nn.Parameter(other.weight.detach().t().contiguous().t())
    expected = other.weight.detach().clone()
    with torch.no_grad():
        other.weight[1, 2] = torch.tensor([1], dtype=torch.int32).bitwise_or(1 << 30).view(torch.float32)[0]
    assert fp.scrub_(other, WBC) == 1
    assert bool((other.weight == expected).sum() == 11)
    fixed = nn.Linear(4, 3)
    with torch.no_grad():
        fixed.weight[0, 0] = float("inf")
    assert fp.scrub_(fixed, fp.FixedPoint()) > 0  # rounds and saturates, as the format does
    assert bool(torch.isfinite(fixed.weight).all())


def test_formats_with_constants_of_a_whole_tensor_are_refused_and_nothing_changes():
    model = nn.Linear(4, 3)
    before = bits_of(model)
    with pytest.raises(FormatError, match="constants of a whole tensor"):
        fp.scrub_(model, fp.BitClipped(fp.Affine(bits=8), zeros=(7,)))
    assert all(torch.equal(a, b) for a, b in zip(bits_of(model), before, strict=True))
