"""Several trials a forward: the records of single trials, whoever shares the forward, or a refusal by name."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import flipproof as fp
from flipproof.campaigns import assess as campaign
from flipproof.campaigns.stacked_trial import StackedRunner
from flipproof.engine.journal import Journal
from flipproof.errors import AuditError, ConfigError, FlipproofWarning, JournalMismatch, ModelError
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats.base import bit_pattern
from flipproof.running import stacked
from flipproof.running.data import read_batches
from flipproof.spaces import device_words
from flipproof.spaces.cell import Cell
from flipproof.spaces.parameters import FaultSpace

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:only .* of the model's stored bits:flipproof.errors.FlipproofWarning"),
]

EVERY = fp.Parameters(buffers=True)
OUTCOMES = ["masked", "non_critical_sdc", "critical_sdc", "due"]
WORDS = ["corrected", "detected", "miscorrected"]


def lines(found: fp.Assessment) -> list[dict[str, object]]:
    """All of each record but how long it took and on what it was made."""
    left = found.trials.drop(columns=["seconds"]).sort_values(["point", "trial"])
    return json.loads(left.to_json(orient="records"))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: bit_pattern(tensor.clone()) for name, tensor in model.state_dict().items()}


class Whole(nn.Module):
    """Whole numbers everywhere: sums are exact, in whatever order they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Linear(27, 6), nn.Linear(6, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-3, 4, parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)).flatten(1))))


def whole_data(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    x = torch.randint(-2, 3, (15, 1, 5, 5)).float()
    with torch.no_grad():
        targets = model(x).argmax(dim=1)
    return [(x[:7], targets[:7]), (x[7:14], targets[7:14]), (x[14:], targets[14:])]


EXACT = [
    (fp.FixedPoint(4, 0), fp.BitErrorRate([1e-3, 3e-2])),
    (fp.FixedPoint(4, 0), fp.StuckAt([1e-2, 2e-1], value=1)),
    (fp.SECDED(fp.FixedPoint(4, 0)), fp.BitErrorRate([3e-2])),
    (fp.TripleMSB(fp.FixedPoint(4, 0)), fp.RandomBits([1, 9])),
    (None, fp.BitPosition([31], share=0.2)),
    (None, fp.BitPosition([23, 31])),  # one trial a point says everything
    (fp.Float16(), fp.BitPosition([14, 15], share=0.1)),  # some become infinite or NaN
]


@pytest.mark.parametrize(("format", "faults"), EXACT)
@pytest.mark.parametrize("together", [2, 5])
def test_exact_arithmetic_gives_the_records_of_single_trials(format, faults, together):
    model = Whole().eval()
    before, setup = state_of(model), {"data": whole_data(model), "faults": faults, "format": format, "trials": 13}
    single = fp.assess(model, **setup, cache_bytes=0)
    shared = fp.assess(model, **setup, together=together)
    assert lines(shared) == lines(single)
    assert shared.trials["masked"].sum() < shared.trials["samples"].sum()
    assert shared.golden == single.golden
    assert shared.header.fingerprint == single.header.fingerprint  # the golden outputs are the same bits here
    assert shared.header.together == together
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class Tied(nn.Module):
    """One matrix under two names, and a lookup: what an embedding is not asked for does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x).sum(dim=1)))


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(11, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net, torch.randn(11, 2, 6, 6)


def encoder() -> tuple[nn.Module, Tensor]:
    return Encoder(), torch.randn(11, 4, 8)


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randint(0, 9, (11, 3))


def parametrised() -> tuple[nn.Module, Tensor]:
    net, x = mlp()
    nn.utils.parametrizations.weight_norm(net[0])
    return net, x


NETWORKS = [mlp, cnn, encoder, tied, parametrised]


def labelled(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        targets = model.eval()(x).argmax(dim=1)
    return [(x[:8], targets[:8]), (x[8:], targets[8:])]


def flipped(tensor: Tensor, bits: list[tuple[int, int]]) -> Tensor:
    """Bits of float32 values, by hand."""
    words = tensor.detach().numpy().copy().reshape(-1).view(np.uint32)
    for index, bit in bits:
        words[index] ^= np.uint32(1 << bit)
    return torch.from_numpy(words.view(np.float32)).reshape(tensor.shape)


def by_hand(model: nn.Module, x: Tensor, places: list[tuple[str, int, int]], slot: int, slots: int) -> Tensor:
    """What one slot answers with these bits flipped in a fresh copy's tensors, all other slots being golden."""
    copy = deepcopy(model).eval()
    named = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    named = {name: t for name, t in named.items() if t.is_floating_point()}
    stacks = {name: torch.stack([t.detach()] * slots) for name, t in named.items()}
    for name in {name for name, _, _ in places}:
        stacks[name][slot] = flipped(named[name], [(value, bit) for at, value, bit in places if at == name])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return vmap(lambda tensors: functional_call(copy, tensors, (x,)))(stacks)[slot]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.filterwarnings("ignore:torch runs .* slot by slot:flipproof.errors.FlipproofWarning")
def test_each_trial_is_what_its_faults_give_by_hand(build):
    model, x = build()
    data = labelled(model, x)
    setup = {"data": data, "faults": fp.RandomBits([1, 3, 60]), "trials": 9, "where": EVERY}
    single = fp.assess(model, **setup, cache_bytes=0).trials
    found = fp.assess(model, **setup, together=4, audit=0.2).trials
    for column in ["point", "trial", "flips", "digest", "samples", *WORDS]:
        assert found[column].tolist() == single[column].tolist(), column
    space, slots = FaultSpace(model, where=EVERY), 4
    golden = [by_hand(model, inputs, [], 0, slots) for inputs, _ in data]
    masked = 0
    for row in found.itertuples():
        point = setup["faults"].points()[row.point]
        draw = point.draw(space, TrialGenerator(0, point.stream, row.trial))
        ended = dict.fromkeys(OUTCOMES, 0)
        for (inputs, _), right in zip(data, golden, strict=True):
            answers = by_hand(model, inputs, space.places(draw), row.trial % slots, slots)
            for one, other in zip(answers, right, strict=True):
                if torch.isnan(one).any():
                    ended["due"] += 1
                elif torch.equal(bit_pattern(one), bit_pattern(other)):
                    ended["masked"] += 1
                else:
                    ended["critical_sdc" if one.argmax() != other.argmax() else "non_critical_sdc"] += 1
        assert [getattr(row, name) for name in OUTCOMES] == [ended[name] for name in OUTCOMES], row
        masked += ended["masked"]
    assert (0 if build is tied else 1) <= masked < found["samples"].sum()  # every score reads all of a tied matrix
    assert found["audited"].sum() >= 5


def setup_of(**changes: object) -> dict[str, object]:
    torch.manual_seed(6)
    model, x = mlp()
    given = {"model": model, "data": labelled(model, x), "faults": fp.RandomBits([1, 4]), "trials": 10, "together": 4}
    return given | changes


def test_an_interruption_in_the_middle_of_a_forward(tmp_path, monkeypatch):
    setup = setup_of(trials=14)
    whole = fp.assess(**setup)
    append, written = Journal.append, []

    def interrupted(self: Journal, record: object) -> None:
        append(self, record)
        written.append(record)
        if len(written) in (6, 13):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupted)
    path = tmp_path / "campaign.jsonl"
    for ran in (6, 13):  # in the middle of the second forward, and of one that began elsewhere
        with pytest.raises(KeyboardInterrupt):
            fp.assess(**setup, journal=path)
        assert len(written) == ran
    assert lines(fp.assess(**setup, journal=path)) == lines(whole)
    assert lines(fp.Assessment.load(path)) == lines(whole)


def test_shards_are_one_campaign(tmp_path):
    setup, paths = setup_of(trials=11), [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]
    for i, path in enumerate(paths, start=1):
        fp.assess(**setup, shard=f"{i}/3", journal=path)
    merged = fp.merge(*paths, into=tmp_path / "all.jsonl")
    assert lines(merged) == lines(fp.assess(**setup))
    assert merged.header.together == 4
    other = tmp_path / "other.jsonl"
    fp.assess(**setup | {"together": 2}, shard="1/3", journal=other)
    with pytest.raises(JournalMismatch, match="together"):
        fp.merge(other, *paths[1:], into=tmp_path / "none.jsonl")


def test_margin_stops_where_single_trials_stop():
    model = Whole().eval()
    setup = {"model": model, "data": whole_data(model), "format": fp.FixedPoint(4, 0), "trials": 90}
    setup |= {"faults": fp.BitErrorRate([1e-3, 3e-2]), "margin": 0.12}
    single, shared = fp.assess(**setup, cache_bytes=0), fp.assess(**setup, together=8)
    assert lines(shared) == lines(single)
    assert len(shared.trials) < 180


def test_any_order_and_any_company(monkeypatch):
    setup, handed = setup_of(trials=9), []
    many = StackedRunner.many
    monkeypatch.setattr(StackedRunner, "many", lambda self, keys: handed.append(keys) or many(self, keys))
    forwards = fp.assess(**setup)
    assert [len(keys) for keys in handed] == [4, 4, 4, 4, 2]
    keys = campaign._Campaign.keys
    monkeypatch.setattr(campaign._Campaign, "keys", lambda self: iter(sorted(keys(self), key=lambda k: (-k[1], k[0]))))
    backwards = fp.assess(**setup)
    assert handed[0] != handed[5]
    assert lines(backwards) == lines(forwards)
    alone = fp.assess(**setup | {"trials": 1})  # two slots of four are used
    assert lines(alone) == [line for line in lines(forwards) if line["trial"] == 0]


class Sized(nn.Module):
    """What a fault makes of a score may be no row of the table: then the forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4, bias=False)
        self.register_buffer("table", torch.arange(40.0).reshape(10, 4) % 7)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x)
        return scores + F.embedding(torch.nan_to_num(scores[:, 0]).long() + 2, self.table)


def test_a_forward_that_raises_is_the_failure_of_the_trial_whose_fault_it_was():
    model = Sized().eval()
    x = torch.randint(0, 3, (9, 3)).float()
    setup = {"data": labelled(model, x), "format": fp.FixedPoint(4, 0), "faults": fp.RandomBits([1, 2]), "trials": 40}
    single = fp.assess(model, **setup, cache_bytes=0).trials
    found = fp.assess(model, **setup, together=8, audit=0.3).trials
    same = ["point", "trial", "flips", "digest", *OUTCOMES, *WORDS]
    assert found[same].equals(single[same])
    raised = found["due"] == found["samples"]
    assert 0 < raised.sum() < len(raised)
    assert found["error"][raised].str.contains("index out of range").all()
    assert found["error"][~raised].isna().all()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-3, 4, parameter.shape))

    def forward(self, x: Tensor, y: Tensor, twice: bool = False) -> dict[str, object]:
        return {"scores": self.a(x) + (2 if twice else 1) * self.b(y), "kind": "scores"}


@pytest.mark.parametrize("give", [lambda x, y: (x, y), lambda x, y: {"y": y, "x": x, "twice": True}])
def test_several_inputs_and_an_output_that_is_picked(give):
    model, x, y = Named().eval(), *torch.randint(-3, 4, (2, 12, 4)).float()
    data = [(give(x[:8], y[:8]), torch.arange(8) % 3), (give(x[8:], y[8:]), torch.arange(4) % 3)]
    setup = {"data": data, "faults": fp.RandomBits([1, 4]), "format": fp.FixedPoint(4, 0), "trials": 7}
    for output in ("scores", lambda found: found["scores"]):
        single = fp.assess(model, **setup, output=output, cache_bytes=0)
        assert lines(fp.assess(model, **setup, output=output, together=3)) == lines(single)


@pytest.fixture
def accelerator(monkeypatch):
    """What lies in memory as it is goes the way of an accelerator."""
    stretch = Cell.stretch.fget
    monkeypatch.setattr(device_words, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(Cell, "stretch", property(lambda cell: None if cell.addressed else stretch(cell)))


def test_the_way_of_an_accelerator(accelerator, monkeypatch, request):
    model = Whole().eval()
    setup = {"data": whole_data(model), "faults": fp.BitPosition([29, 31], share=0.2), "trials": 9}
    there = fp.assess(model, **setup, together=4)
    monkeypatch.undo()
    assert lines(there) == lines(fp.assess(model, **setup, cache_bytes=0))


def test_nothing_waits_for_the_device_until_all_batches_are_done(accelerator, monkeypatch):
    waits: list[str] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if any(word in name for word in ("local_scalar", "nonzero", "equal.default", "is_nonzero", "unique")):
                waits.append(name)
            return function(*args, **(kwargs or {}))

    inside = stacked.StackedModel.answers

    def watched(self, draws, batch=None):
        with Watched():
            return inside(self, draws, batch)

    fp.assess(**setup_of(audit=0))  # `faithful` looks at the bytes of a device once
    monkeypatch.setattr(stacked.StackedModel, "answers", watched)
    many = StackedRunner.many

    def settled(self, keys):
        waits.clear()
        found = many(self, keys)
        assert not waits
        return found

    monkeypatch.setattr(StackedRunner, "many", settled)
    fp.assess(**setup_of(audit=0, faults=fp.BitErrorRate([1e-2]), trials=6))


class Mixing(torch.autograd.Function):
    """An operator whose rule for many at once takes one scale for all of them."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x / torch.nan_to_num(x, nan=0.0, posinf=1e9).abs().amax().clamp(min=1e-3)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return Mixing.apply(x), in_dims[0]


class Leaking(zoo.Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Mixing.apply(self.a(x)))


class Neighbour(torch.autograd.Function):
    """Adds nothing of the slot beside it, unless that is not finite."""

    generate_vmap_rule = False
    forward = staticmethod(lambda x: x + 0 * x)
    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def vmap(info, in_dims, x):
        x = x.movedim(in_dims[0], 0)
        return x + 0 * x.roll(1, 0), 0


class LeakingAside(zoo.Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Neighbour.apply(self.a(x)))


class Numbered(torch.autograd.Function):
    """The last slot is rounded otherwise."""

    generate_vmap_rule = False
    forward = staticmethod(lambda x: x.clone())
    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def vmap(info, in_dims, x):
        x = x.movedim(in_dims[0], 0).clone()
        x[-1] *= 1 + 2**-22
        return x, 0


class Uneven(zoo.Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Numbered.apply(self.a(x)))


class Jealous(torch.autograd.Function):
    """The last slot is rounded otherwise where it differs from the second."""

    generate_vmap_rule = False
    forward = staticmethod(lambda x: x.clone())
    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def vmap(info, in_dims, x):
        x = x.movedim(in_dims[0], 0).clone()
        x[-1] *= torch.where(x[-1] == x[1], 1.0, 1 + 2**-22)
        return x, 0


class UnevenUnderFaults(zoo.Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Jealous.apply(self.a(x)))


LAST: dict[str, Tensor] = {}


class Remembering(zoo.Net):
    """Adds nothing of the last forward, unless that was not finite: state in a global."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        before = LAST.get("h")
        LAST["h"] = h.detach().sum()
        return self.b(h if before is None else h + 0 * before)


ELSEWHERE: list[nn.Module] = []


class Reading(zoo.Net):
    """Reads a weight once as its own and once from a global, which no copy of the model has."""

    def __init__(self) -> None:
        super().__init__()
        ELSEWHERE[:] = [self.b]

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + ELSEWHERE[0](h.flip(1))


class Attached(zoo.Net):
    """A plain attribute that lies in the memory of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = self.b.weight.detach()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * self.gain)


class Writing(zoo.Net):
    """Clips a weight where it lies, which without faults changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.b.weight.detach().clamp_(-3, 3)
        return self.b(F.relu(self.a(x)))


class WritingUnseen(zoo.Net):
    """The same past the version counter."""

    def forward(self, x: Tensor) -> Tensor:
        self.b.weight.data.clamp_(-3, 3)
        return self.b(F.relu(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(zoo.FEATURES, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None])[0][:, -1])


class Dropping(zoo.Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(F.relu(self.a(x)), 0.5, training=True))


class Uncopied(zoo.Net):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("there is one of these")


REFUSED = [
    (Leaking, "values in some slots change what other slots answer"),
    (LeakingAside, "NaN values in some slots change what other slots answer"),
    (Uneven, "slots without faults answer batch 0 with other bits"),
    (UnevenUnderFaults, "other bits in another slot, or beside other faults"),
    (Remembering, "change what other slots answer"),
    (Reading, r"what is put into b\.(weight|bias) does not reach all"),
    (Attached, "b.weight and gain share memory"),
    (Writing, "writes to"),
    (WritingUnseen, "accessing `data` under vmap"),
    (Recurrent, "vmap cannot run it on batch 0"),
    (Dropping, "draws random numbers"),
    (Uncopied, "cannot be copied"),
    (zoo.Guarded, "vmap cannot run it on batch 0"),
    (zoo.Solved, "change what other slots answer"),
    (zoo.Baked, "vmap cannot run it on batch 0"),
    (zoo.ViewOfWeight, "share memory"),
    (zoo.Hooked, "a hook of a refers to tensors"),
    (zoo.Replaced, "replaced by one that refers to tensors"),
    (zoo.MaxNorm, "writes to"),
    (zoo.TrainedNorm, "writes to norm"),
    (zoo.Observed, "writes to observer"),
    (zoo.Random, "writes to|draws random numbers"),
    (zoo.Latch, "vmap cannot run it on batch 0"),
]


@pytest.mark.parametrize(("build", "why"), REFUSED)
@pytest.mark.parametrize("audit", [0.0, 0.01])
def test_what_is_not_proved_is_refused(build, why, audit):
    LAST.clear()
    torch.manual_seed(3)
    model = build().eval()
    before = state_of(model)
    with pytest.raises(ModelError, match=why) as refused:
        fp.assess(model, zoo.batches(), faults=fp.RandomBits(3), trials=8, together=4, audit=audit)
    refused.match("together=4 cannot be had: .* Leave together= out")
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_runs_slot_by_slot_is_said():
    model, x = encoder()
    with pytest.warns(FlipproofWarning, match="slot by slot: together=2 saves nothing there"):
        fp.assess(model, labelled(model, x), faults=fp.RandomBits(1), trials=2, together=2)


@pytest.mark.parametrize("together", [0, -1, 1.5, True, "4", None])
def test_numbers_that_are_none(together):
    with pytest.raises(ConfigError, match="together="):
        fp.assess(**setup_of(together=together))


def test_what_else_is_refused():
    with pytest.raises(ConfigError, match="workers=2 are several"):
        fp.assess(**setup_of(workers=2))
    with pytest.raises(ConfigError, match="upsets of a batch share forwards as it is"):
        fp.assess(**setup_of(where=fp.Neurons()))
    model, x = mlp()
    packed, data = fp.pack_(deepcopy(model), fp.Affine(8)), labelled(model, x)
    with pytest.raises(ModelError, match="packed words"):
        fp.assess(packed, data, faults=fp.RandomBits(1), trials=2, together=2)


def test_a_journal_says_how_many(tmp_path):
    one, four = tmp_path / "one.jsonl", tmp_path / "four.jsonl"
    fp.assess(**setup_of(together=1), journal=one)
    fp.assess(**setup_of(), journal=four)
    first = [json.loads(path.read_text().splitlines()[0]) for path in (one, four)]
    assert "together" not in first[0]
    assert first[1]["together"] == 4
    assert first[0].keys() | {"together"} == first[1].keys()
    assert "together" not in first[1]["fingerprint"]
    for path, other in ((one, 4), (four, 1), (four, 2)):
        with pytest.raises(JournalMismatch, match="together"):
            fp.assess(**setup_of(together=other), journal=path)


def test_audits_find_what_no_proof_foresaw(tmp_path, monkeypatch):
    """Two slots are exchanged once the campaign runs: an audit must see that, and nothing may go on."""
    answers = stacked.StackedModel.answers

    def exchanged(self, draws, batch=None):
        found = answers(self, draws, batch)
        return found if batch is not None or len(draws) < 4 else {**found, 0: found[1], 1: found[0]}

    monkeypatch.setattr(stacked.StackedModel, "answers", exchanged)
    path = tmp_path / "campaign.jsonl"
    with pytest.raises(AuditError, match="Leave together= out, in another journal") as failed:
        fp.assess(**setup_of(), journal=path)
    assert failed.value.shortcut == "together"
    monkeypatch.undo()
    with pytest.raises(AuditError, match="in another journal"):
        fp.assess(**setup_of(), journal=path)


def test_what_is_left_in_a_slot_is_found(monkeypatch):
    answers = stacked.StackedModel.answers

    def leaving(self, draws, batch=None):
        found = answers(self, draws, batch)
        if batch is None:
            next(iter(self.stacks.values()))[2].data.view(-1)[0] += 1
        return found

    monkeypatch.setattr(stacked.StackedModel, "answers", leaving)
    with pytest.raises(AuditError, match=r"0\.weight"):
        fp.assess(**setup_of())


FORMATS = [None, fp.Affine(8), fp.Float16(), fp.SECDED(fp.Float16(), 64), fp.RangeChecked(fp.Float16())]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_slots_hold_what_single_faults_leave(format, monkeypatch):
    """Every bit of every tensor of each slot, in formats whose words lie alone, in blocks, and behind constants."""
    model, x = cnn()
    data = labelled(model, x)
    space, seen = FaultSpace(model, format=format, where=EVERY), []
    forward = stacked.StackedModel.forward

    def watched(self, batch):
        seen.append({name: stack.clone() for name, stack in self.stacks.items()})
        return forward(self, batch)

    monkeypatch.setattr(stacked.StackedModel, "forward", watched)
    with space.stored(), torch.no_grad():
        stack = stacked.StackedModel(model, space, read_batches(data, torch.device("cpu")), None, 3)
        draws = [fp.BitErrorRate(2e-2).draw(space, TrialGenerator(1, "", i)) for i in (0, 1)]
        with stack.stored():
            assert stack.differing() == []
            stack.answers({0: draws[0], 2: draws[1]}, 0)
            assert stack.differing() == []
        golden = {name: bit_pattern(tensor.clone()) for name, tensor in space.tensors.items()}
        expected = [golden, golden, golden]
        for slot, draw in ((0, draws[0]), (2, draws[1])):
            with space.corrupted(draw):
                expected[slot] = {name: bit_pattern(tensor.clone()) for name, tensor in space.tensors.items()}
            assert any(not torch.equal(expected[slot][name], golden[name]) for name in golden)
    for slot, tensors in enumerate(expected):
        for name, bits in tensors.items():
            assert torch.equal(bit_pattern(seen[0][name][slot]), bits), (name, slot)
