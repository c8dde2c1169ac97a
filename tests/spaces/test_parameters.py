from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import flipproof as fp
from flipproof.errors import FaultSpaceError
from flipproof.spaces.contract import Faults
from flipproof.spaces.parameters import FaultSpace


class Everything(nn.Module):
    """Tied weights, a shared module, normalisation, an extra parameter, a parameter list, integer and float buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.block = nn.Linear(3, 3)
        self.again = self.block
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.register_buffer("mean", torch.zeros(3))


BUFFER = "a buffer: fp.Parameters(buffers=True) takes it"


def names(space: FaultSpace) -> list[str]:
    return [site.name for site in space.sites]


def test_every_parameter_once_with_its_names_kind_and_layer():
    space = FaultSpace(Everything())
    found = {site.name: (site.aliases, site.kind, site.layer, site.values) for site in space.sites}
    assert found == {
        "scale": ((), "other", "", 1),
        "embed.weight": (("head.weight",), "weight", "embed", 15),
        "head.bias": ((), "bias", "head", 5),
        "block.weight": (("again.weight",), "weight", "block", 9),
        "block.bias": (("again.bias",), "bias", "block", 3),
        "norm.weight": ((), "norm", "norm", 3),
        "norm.bias": ((), "norm", "norm", 3),
        "extra.0": ((), "other", "extra", 2),
    }
    assert space.bits == 32 * sum(values for *_, values in found.values())
    assert FaultSpace(Everything(), where=fp.Parameters(buffers=True)).bits == space.bits + 32 * (3 + 3 + 3)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (fp.Parameters(include="head"), ["embed.weight", "head.bias"]),
        (fp.Parameters(include="again"), ["block.weight", "block.bias"]),
        (fp.Parameters(include="*.bias", exclude=["norm"]), ["head.bias", "block.bias"]),
        (fp.Parameters(kinds="norm"), ["norm.weight", "norm.bias"]),
        (fp.Parameters(kinds=["other"], exclude="scale"), ["extra.0"]),
        (fp.Parameters(kinds="buffer", buffers=True), ["norm.running_mean", "norm.running_var", "mean"]),
    ],
)
def test_selection(where, expected):
    space = FaultSpace(Everything(), where=where)
    assert sorted(names(space)) == sorted(expected)
    assert set(space.left_out).isdisjoint(expected)


def test_what_is_left_out_says_why():
    where = fp.Parameters(exclude=["embed", "scale"])
    space = FaultSpace(Everything(), format=fp.Affine(bits=4), where=where)
    quantised = [site.name for site in space.sites if site.format == fp.Affine(bits=4)]
    assert quantised == ["block.weight"]
    assert space.left_out == {
        "embed.weight": "not selected by where=",
        "scale": "not selected by where=",
        **dict.fromkeys(["norm.running_mean", "norm.running_var", "mean"], BUFFER),
        "norm.num_batches_tracked": "a counter that inference never reads",
    }
    assert space.left_out_bits == 32 * (15 + 1 + 3 + 3 + 3)


def test_nothing_left_names_what_there_is():
    with pytest.raises(FaultSpaceError, match=r"no parameter is left.*\n.*scale \(other\)\n.*embed\.weight \(weight\)"):
        FaultSpace(Everything(), where=fp.Parameters(include="conv*"))
    with pytest.raises(FaultSpaceError, match="none at all"):
        FaultSpace(nn.ReLU())
    with pytest.raises(FaultSpaceError, match=r"kinds must be among .*, got \['weights'\]"):
        fp.Parameters(kinds="weights")


def test_every_bit_has_a_name_and_back():
    space = FaultSpace(Everything(), format={"embed": fp.Float16(), "*": fp.Float32()})
    everything = fp.RandomBits(space.bits).draw(space, fp.faults.TrialGenerator(0, "p", 0))
    table = space.locate(everything)
    assert len(table) == space.bits
    per_site = table.groupby("site").size().to_dict()
    assert per_site == {site.name: site.bits for site in space.sites}
    sample = np.random.default_rng(0).choice(space.bits, 50, replace=False)
    picked = Faults(np.sort(sample))
    again = space.faults(space.places(picked))
    assert again.positions.tolist() == picked.positions.tolist()
    assert (
        space.faults([("head.weight", 3, 1)]).positions.tolist()
        == space.faults([("embed.weight", 3, 1)]).positions.tolist()
    )


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([("nothing", 0, 0)], "'nothing' is not in the fault space"),
        ([("block.bias", 3, 0)], "block.bias has values 0 to 2"),
        ([("block.bias", 0, 32)], "of bits 0 to 31"),
        ([("block.bias", 1, 1), ("again.bias", 1, 1)], "named twice"),
    ],
)
def test_places_that_do_not_exist(places, message):
    with pytest.raises(FaultSpaceError, match=message):
        FaultSpace(Everything()).faults(places)


def test_faults_of_another_space_are_refused():
    big, small = FaultSpace(nn.Linear(9, 9)), FaultSpace(nn.Linear(2, 2))
    with (
        pytest.raises(FaultSpaceError, match="outside the space of 192 bits"),
        small.corrupted(big.faults([("weight", 80, 0)])),
    ):
        pass


def problem(change) -> str:
    net = nn.Linear(2, 2)
    change(net)
    with pytest.raises(FaultSpaceError) as error:
        FaultSpace(net)
    return str(error.value)


def test_tensors_that_cannot_be_hit_are_named_with_what_to_do():
    def masked(net):
        net.mask = nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False)

    def sparse(net):
        net.mask = nn.Parameter(torch.eye(3).to_sparse())

    def overlapping(net):
        net.part = nn.Parameter(net.weight.detach()[0])

    def gaps(net):
        net.every_other = nn.Parameter(torch.zeros(6)[::2])

    def double(net):
        net.precise = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    assert "mask: is torch.bool, which has no Format" in problem(masked)
    assert "mask: is torch.sparse_coo; call .to_dense()" in problem(sparse)
    assert "part and weight overlap in memory" in problem(overlapping)
    assert "every_other: is a view whose elements do not fill their memory" in problem(gaps)
    assert "precise is torch.float64: pass format=" in problem(double)
    with pytest.raises(FaultSpaceError, match="not initialised yet"):
        FaultSpace(nn.LazyLinear(3))
    with pytest.raises(FaultSpaceError, match="meta device"):
        FaultSpace(nn.Linear(2, 2, device="meta"))


def test_parametrised_and_pruned_weights_belong_to_their_layer():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    prune.l1_unstructured(net[1], "weight", amount=2)
    sites = {site.name: site.layer for site in FaultSpace(net).sites}
    assert sites["0.parametrizations.weight.original0"] == "0"
    assert sites["1.weight_orig"] == "1"


def test_memory_of_another_layout_is_hit_where_it_is():
    """channels_last convolutions and transposed weights: flat indices are row-major, whatever the strides."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2)).to(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    before = net[0].weight.detach().clone(memory_format=torch.contiguous_format)
    for format in (fp.Float32(), fp.Float16()):
        space = FaultSpace(net, format=format)
        with space.stored():
            clean = net[0].weight.detach().clone(memory_format=torch.contiguous_format)
            with space.corrupted(space.faults([("0.weight", 5, 14)])):
                differing = (net[0].weight.detach() != clean).reshape(-1)
                assert torch.nonzero(differing).tolist() == [[5]]
        assert torch.equal(net[0].weight, before)


def test_layers_cover_the_space_and_the_table_adds_up():
    space = FaultSpace(Everything())
    spans = sorted(span for spans in space.layers.values() for span in spans)
    assert spans[0][0] == 0
    assert spans[-1][1] == space.bits
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    table = space.table()
    assert table["bits"].sum() == space.bits
    assert table["share"].sum() == pytest.approx(1)


def test_a_space_travels_to_another_process():
    net = nn.Linear(2, 2)
    space, other = pickle.loads(pickle.dumps((FaultSpace(net), net)))
    again = FaultSpace(other)
    assert names(again) == names(space)
    assert again.bits == space.bits
