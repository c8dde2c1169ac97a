import struct

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import FaultModelError, FlipproofWarning, FormatError


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 5)
    return net, [(x, net(x).argmax(dim=1))]


def test_profile_equals_a_count_of_the_bytes():
    net, _ = small()
    values = torch.cat([p.detach().reshape(-1) for p in net.parameters()]).tolist()
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
    expected = [sum(word >> bit & 1 for word in words) / len(words) for bit in range(32)]
    profile = fp.bit_profile(net)
    assert profile.tolist() == expected
    assert profile.index.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("format", "width"), [(fp.BFloat16(), 16), (fp.FixedPoint(), 32), (fp.Affine(bits=5), 5), (fp.Float8E4M3(), 8)]
)
def test_profile_of_other_formats_counts_their_words(format, width):
    net, _ = small()
    space = fp.FaultSpace(net, format={"*": format})
    words = np.concatenate([format.encode(t).words.reshape(-1).numpy() for t in space.tensors.values()])
    profile = fp.bit_profile(net, {"*": format})
    assert profile.tolist() == [float(np.mean(words.astype(np.int64) >> bit & 1)) for bit in range(width)]


def test_constant_bits_of_the_usual_formats():
    net, _ = small()  # all weights lie within ±0.5
    constant = {
        repr(f): [b for b, mean in fp.bit_profile(net, f).items() if mean in (0.0, 1.0)]
        for f in (fp.Float32(), fp.BFloat16())
    }
    assert 30 in constant["Float32()"]
    assert 14 in constant["BFloat16()"]
    profile = fp.bit_profile(net, fp.FixedPoint())
    # two's complement: from bit 15 up every bit repeats the sign, so that none is constant
    assert profile.iloc[15:].nunique() == 1
    assert 0 < profile[31] < 1


def test_profile_tells_how_to_go_on_with_mixed_widths_and_counts_what_memory_holds():
    net, _ = small()
    with pytest.raises(FormatError, match="include"):
        fp.bit_profile(net, {"0": fp.Float32(), "2": fp.BFloat16()})
    clipped = fp.bit_profile(net, fp.BitClipped(fp.Float32(), zeros=(30,)))
    assert clipped.equals(fp.bit_profile(net, fp.Float32()))


def test_criticality_is_what_flipping_by_hand_does():
    net, data = small()
    table = fp.bit_criticality(net, data).set_index("bit")
    x, y = data[0]
    for bit in (0, 22, 23, 26, 29, 30, 31):
        mask = -(2**31) if bit == 31 else 1 << bit
        for p in net.parameters():
            p.data.view(torch.int32).bitwise_xor_(mask)
        out = net(x)
        for p in net.parameters():
            p.data.view(torch.int32).bitwise_xor_(mask)
        nan = out.isnan().any(dim=1)
        assert table.loc[bit, "accuracy"] == pytest.approx(float(((out.argmax(dim=1) == y) & ~nan).float().mean()))
        assert table.loc[bit, "due"] == pytest.approx(float(nan.float().mean()))
    assert table.loc[30, "constant"]
    assert not table.loc[0, "constant"]
    assert table["accuracy_drop"].idxmax() == 30 or table.loc[30, "critical_total"] == table["critical_total"].max()


def test_clipping_the_model_takes_the_critical_constant_bit_and_leaves_outputs_as_they_are():
    net, data = small()
    chosen = fp.choose_clipping(net, data)
    assert chosen == fp.BitClipped(fp.Float32(), zeros=(30,))
    faults = fp.BitErrorRate([1e-2])
    plain = fp.assess(net, data=data, faults=faults, trials=40, format=fp.Float32())
    clipped = fp.assess(net, data=data, faults=faults, trials=40, format=chosen)
    assert clipped.golden == plain.golden
    assert clipped.trials["due"].sum() == 0 < plain.trials["due"].sum()
    assert clipped.summary["critical_total"][0] < plain.summary["critical_total"][0]


def test_clipping_the_model_of_bfloat16_and_several():
    net, data = small()
    assert fp.choose_clipping(net, data, format=fp.BFloat16()).zeros == (14,)
    several = fp.choose_clipping(net, data, most=None)
    table = fp.bit_criticality(net, data)
    wanted = table[table["constant"] & (table["critical_total"] > 0)]["bit"].tolist()
    assert sorted((*several.zeros, *several.ones)) == wanted
    assert len(wanted) > 1


def test_clipping_the_model_warns_of_a_critical_bit_that_varies_and_refuses_where_nothing_is_left():
    net, data = small()
    with pytest.raises(FormatError, match="both constant over the weights and critical; constant are none"):
        fp.choose_clipping(net, data, format=fp.FixedPoint())
    with torch.no_grad():  # exponents 127 and, once, 129: they differ in bit 30 and agree in bit 23
        for p in net.parameters():
            p.copy_(p.sign() * (1 + p.abs()))
        net[0].weight[0, 0] = 4.5
    net[1] = nn.Tanh()  # a ReLU network would only be scaled: a constant exponent bit multiplies all alike
    data = [(data[0][0], net(data[0][0]).argmax(dim=1))]
    with pytest.warns(FlipproofWarning, match=r"bit 30 is the most critical .* clipping \[23\] instead"):
        chosen = fp.choose_clipping(net, data)
    assert chosen == fp.BitClipped(fp.Float32(), ones=(23,))
    with pytest.raises(FormatError, match="most"):
        fp.choose_clipping(net, data, most=0)


@pytest.mark.parametrize(
    ("shift", "most", "format"),
    [(0.0, 1, fp.Float32()), (0.4, 2, fp.BFloat16()), (1.0, 1, fp.BFloat16()), (0.4, None, fp.FixedPoint(3, 4))],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:bit .* is the most critical")
def test_measuring_constant_bits_alone_chooses_what_measuring_all_bits_does(shift, most, format):
    net, data = small()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(p.sign() * shift)
    data = [(data[0][0], net(data[0][0]).argmax(dim=1))]
    table = fp.bit_criticality(net, data, format, share=0.1, trials=6, seed=1)  # of every bit
    ranked = table.sort_values(["accuracy_drop", "critical_total", "bit"], ascending=False)
    critical = ranked[(ranked["critical_total"] > 0) | (ranked["accuracy_drop"] > 0)]
    wanted = critical[critical["constant"]].head(most or len(table))
    asked = {"format": format, "most": most, "share": 0.1, "trials": 6, "seed": 1}
    if wanted.empty:
        with pytest.raises(FormatError, match="no bit"):
            fp.choose_clipping(net, data, **asked)
        return
    chosen = fp.choose_clipping(net, data, **asked)
    assert {*chosen.zeros} == {*wanted.loc[wanted["mean"] == 0, "bit"]}
    assert {*chosen.ones} == {*wanted.loc[wanted["mean"] == 1, "bit"]}


def test_a_bit_is_measured_alike_whichever_others_are():
    net, data = small()
    every = fp.bit_criticality(net, data, share=0.1, trials=4).set_index("bit")
    few = fp.bit_criticality(net, data, bits=[29, 3], share=0.1, trials=4).set_index("bit")
    assert few.drop(columns="audited").equals(every.drop(columns="audited").loc[few.index])
    with pytest.raises(FaultModelError):
        fp.bit_criticality(net, data, bits=[32])


def test_only_bits_that_can_be_chosen_are_measured(monkeypatch):
    net, data = small()
    asked, assess = [], fp.storage.clipping.assess

    def counted(*args, **options):
        asked.append((len(options["faults"].points()), options["trials"]))
        return assess(*args, **options)

    monkeypatch.setattr(fp.storage.clipping, "assess", counted)
    profile = fp.bit_profile(net)
    constant = int(profile.isin([0.0, 1.0]).sum())
    nearly = int(((profile > 0) & (profile < 0.1) | (profile < 1) & (profile > 0.9)).sum())
    fp.choose_clipping(net, data)
    assert asked == [(constant, 20), (nearly + 1, 2)][: 1 + bool(nearly)]
    assert 0 < constant < 6


def test_clipping_tensors_clips_wherever_the_critical_bit_is_constant():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].weight[3] = 2.5
    net.eval()
    x = torch.randn(64, 5)
    data = [(x, net(x).argmax(dim=1))]
    formats = fp.choose_clipping(net, data, per="tensor", share=0.2)
    clipped = fp.BitClipped(fp.Float32(), zeros=(30,))
    assert formats == {
        **dict.fromkeys(("0.weight", "0.bias", "1.bias", "3.weight", "3.bias"), clipped),
        "1.weight": fp.Float32(),
    }
    faults = fp.BitPosition(30, share=0.2)
    plain = fp.assess(net, data=data, faults=faults, trials=20)
    safe = fp.assess(net, data=data, faults=faults, trials=20, format=formats)
    assert safe.golden == plain.golden
    assert safe.summary["critical_total"][0] < plain.summary["critical_total"][0]
    with torch.no_grad():
        for p in net.parameters():
            p[..., 0] = 3.0
    with pytest.raises(FormatError, match="vary in every tensor"):
        fp.choose_clipping(
            net, [(x, net(x).argmax(dim=1))], per="tensor", where=fp.Parameters(include="*.weight"), share=0.5
        )
    with pytest.raises(FormatError, match="most"):
        fp.choose_clipping(net, data, per="tensor", most=True)
    with pytest.raises(FormatError, match="per='model' or per='tensor', got 'layer'"):
        fp.choose_clipping(net, data, per="layer")
