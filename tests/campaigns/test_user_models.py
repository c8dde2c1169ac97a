"""Models as users have them, assessed as they are."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import flipproof as fp
from flipproof.errors import ConfigError, DataError
from flipproof.running.data import read_batches

CPU = torch.device("cpu")


def assessed(model, inputs, classes=3, n=6, **change):
    """Three ways to run the same campaign; their records must agree and the model must come back."""
    setup = {"data": [(inputs, torch.arange(n) % classes)], "faults": fp.RandomBits(1), "trials": 12, **change}
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    result = fp.assess(model, **setup)
    whole = fp.assess(model, **setup, cache_bytes=0)
    assert result.trials.drop(columns="seconds").equals(whole.trials.drop(columns="seconds"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (result.trials[["masked", "non_critical_sdc", "critical_sdc", "due"]].sum(axis=1) == n).all()
    return result


def test_torchvision_resnet18():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=3)
    result = assessed(model, torch.randn(2, 3, 32, 32), n=2, faults=fp.BitErrorRate(1e-6), trials=3)
    assert result.bits == 32 * sum(p.numel() for p in model.parameters())
    assert result.trials["flips"].eq(round(result.bits * 1e-6)).all()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, hidden=None):
        out, hidden = self.lstm(x, hidden)
        return self.head(out[:, -1]), hidden


def test_lstm_that_returns_its_state_too():
    model, x = Classifier(), torch.randn(6, 7, 4)
    by_index = assessed(model, x, output=0)
    by_function = assessed(model, x, output=lambda raw: raw[0])
    assert by_index.trials.drop(columns="seconds").equals(by_function.trials.drop(columns="seconds"))
    stored = assessed(model, x, output=0, format=fp.Affine(bits=4)).header.stored
    assert {entry.name for entry in stored} == {name for name, _ in model.named_parameters()}
    quantised = {entry.name for entry in stored if entry.format == repr(fp.Affine(bits=4))}
    assert quantised == {"head.weight", *(f"lstm.weight_{kind}h_l{layer}" for kind in "ih" for layer in (0, 1))}


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, packed):
            out, _ = self.lstm(packed)
            return self.head(pad_packed_sequence(out, batch_first=True)[0].mean(dim=1))

    lengths = torch.tensor([3, 7, 1, 2, 7, 4])
    assessed(Packed(), pack_padded_sequence(torch.randn(6, 7, 4), lengths, batch_first=True, enforce_sorted=False))


def test_dictionaries_in_and_out():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, *, image, table, scale=1.0):
            return {"hidden": image, "logits": self.left(image) + scale * self.right(table)}

    inputs = {"table": torch.randn(6, 2), "image": torch.randn(6, 4)}
    model = Tower()
    plain = assessed(model, inputs, output="logits")
    wrapped = assessed(model, UserDict(inputs), output="logits")  # as tokenizers give it
    assert plain.trials.drop(columns="seconds").equals(wrapped.trials.drop(columns="seconds"))
    assert plain.header.fingerprint == wrapped.header.fingerprint


def test_several_inputs():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Bilinear(4, 2, 3)

        def forward(self, a, b):
            return self.net(a, b)

    for kind in (tuple, list):
        assessed(Pair(), kind([torch.randn(6, 4), torch.randn(6, 2)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    format = fp.Float32() if dtype == torch.float64 else None
    result = assessed(model, torch.randn(6, 4, dtype=dtype), format=format, metrics=("accuracy", "auroc"))
    width = 32 if dtype == torch.float64 else 16
    assert result.bits == width * sum(p.numel() for p in model.parameters())


def test_double_precision_asks_how_it_is_stored():
    with pytest.raises(fp.FlipproofError, match=r"weight is torch\.float64.*pass format="):
        fp.assess(
            nn.Linear(4, 3).double(), data=[(torch.randn(3, 4).double(), torch.arange(3))], faults=fp.RandomBits(1)
        )


def test_batch_norm_buffers_on_request():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(6, 1, 6, 6)
    without = assessed(model, x)
    result = assessed(model, x, where=fp.Parameters(buffers=True))
    assert result.bits - without.bits == 2 * 4 * 32
    assert {s.name for s in result.header.stored if s.kind == "buffer"} == {"1.running_mean", "1.running_var"}
    only = assessed(model, x, where=fp.Parameters(kinds="buffer", buffers=True), faults=fp.BitPosition(30))
    assert only.summary["masked"].item() < 1


def test_tied_weights_are_stored_once_and_hit_in_both_places():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(torch.relu(self.embed(x)))

    model, x = Tied(), torch.randn(8, 4)
    result = assessed(model, x, classes=4, n=8)
    assert result.bits == 16 * 32
    space = fp.FaultSpace(model)
    with space.corrupted(space.faults([("out.weight", 0, 31)])), torch.no_grad():
        flipped = model(x)
    weight = model.embed.weight.detach().clone()
    weight[0, 0] *= -1
    assert torch.equal(flipped, torch.relu(x @ weight.T) @ weight.T)


def test_transformer_encoder():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed, self.encode = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.encode(self.embed(tokens)).mean(dim=1))

    assessed(Encoder(), torch.randint(20, (6, 5)))


def test_a_data_loader_is_read_once():
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    model = nn.Linear(4, 3)
    result = fp.assess(model, data=loader, faults=fp.RandomBits(0))
    assert result.trials["masked"].tolist() == [10]  # were it shuffled again, golden outputs would not fit
    assert result.golden["accuracy"] == float((model(x).argmax(dim=1) == y).double().mean())


class Opaque:
    def __init__(self, x):
        self.x = x.numpy()


class TestDigest:
    """What the journal takes as "the same data"."""

    def test_every_element_of_a_long_input_counts(self):
        long = torch.randn(3, 5000)
        changed = long.clone()
        changed[1, 2500] += 1e-6  # a printed tensor shows neither this element nor this digit
        lengths = torch.tensor([50, 40, 30])

        def packed(x):
            return pack_padded_sequence(x.reshape(3, 50, 100), lengths, batch_first=True)

        for wrap in (lambda x: x, packed, lambda x: {"x": x}, lambda x: x.numpy(), Opaque):
            same, again, other = (
                read_batches([(wrap(x), torch.arange(3))], CPU).digest() for x in (long, long.clone(), changed)
            )
            assert same == again != other

    def test_type_shape_and_targets_count(self):
        x, y = torch.zeros(4, 2), torch.arange(4)
        variants = [(x, y), (x.double(), y), (x.reshape(4, 1, 2), y), (-x, y), (x, y.flip(0)), ({"x": x}, y), ((x,), y)]
        digests = {read_batches([batch], CPU).digest() for batch in variants}
        assert len(digests) == len(variants)

    def test_what_cannot_be_told_apart_is_refused(self):
        with pytest.raises(DataError, match="an input is a function that cannot be pickled"):
            read_batches([((torch.zeros(3), lambda: 0), [0, 1, 2])], CPU).digest()

    def test_empty_and_odd_tensors(self):
        for x in (torch.zeros(3, 0), torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.complex64)):
            assert read_batches([(x, [0, 1, 2])], CPU).digest()

    def test_packed_sequences_move_with_the_rest(self):
        packed = pack_padded_sequence(torch.randn(2, 3, 4), torch.tensor([3, 2]), batch_first=True)
        (moved,) = read_batches([(packed, [0, 1])], torch.device("meta")).inputs
        assert isinstance(moved, PackedSequence)
        assert moved.data.device.type == "meta"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: torch.compile(net, backend="eager"),
        pytest.param(
            lambda net: torch.compile(net, backend="aot_eager"),
            marks=pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
        ),
        nn.DataParallel,
    ],
    ids=["compiled", "compiled with aot", "DataParallel"],
)
def test_compiled_and_parallel_models_give_the_records_of_the_plain_one(wrap, mlp, blobs):
    setup = {"data": blobs, "faults": fp.BitErrorRate(0.02), "trials": 12}
    plain = fp.assess(mlp.eval(), **setup)
    wrapped = fp.assess(wrap(mlp), **setup)
    assert wrapped.golden == plain.golden
    assert wrapped.trials["masked"].min() < 30  # faults reach what runs, compiled or not
    columns = ["digest", "flips", "accuracy", "masked", "non_critical_sdc", "critical_sdc", "due"]
    assert wrapped.trials[columns].equals(plain.trials[columns])


@pytest.mark.parametrize("compiled", [lambda net: torch.compile(net, backend="eager"), nn.Module.compile])
def test_compiled_models_are_refused_where_hooks_would_not_run(compiled, mlp, blobs):
    """Compiled before, it never called them; compiled anew for each trial, it gave up: every sample was a DUE."""
    net = nn.Sequential(mlp)
    whole = compiled(mlp) or net  # `Module.compile` works in place
    for ask in (
        lambda: fp.assess(whole, data=blobs, faults=fp.RandomBits(1), where=fp.Neurons()),
        lambda: fp.analyze(whole, blobs, fp.DeepVigor()),
        lambda: fp.propagation(whole, blobs, faults=fp.RandomBits(1)),
    ):
        with pytest.raises(fp.FlipproofError, match="is compiled, and compiled code does not call the hooks"):
            ask()


def test_a_sparse_buffer_is_part_of_what_is_assessed(blobs, tmp_path):
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("mask", torch.eye(3).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.mask, self.head(x).T).T

    model = Sparse()
    setup = {"data": blobs, "faults": fp.RandomBits(1), "trials": 2, "journal": tmp_path / "j.jsonl"}
    fp.assess(model, **setup)
    model.mask = (2 * torch.eye(3)).to_sparse()
    with pytest.raises(fp.FlipproofError, match="weights: "):
        fp.assess(model, **setup)


class Prior(nn.Module):
    """Answers with a view of what it stores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "expanded":
            return self.table[0].expand(len(x), 4)
        rows = self.table[: len(x)]
        return rows.clone() if self.kind == "cloned" else rows


@pytest.mark.parametrize("kind", ["expanded", "sliced"])
@pytest.mark.parametrize("format", [None, fp.SECDED(fp.Float32()), fp.Affine(bits=8)])
def test_an_answer_that_shares_memory_with_a_parameter_is_what_it_was_under_faults(kind, format):
    data = [(torch.randn(8, 3), torch.full((8,), 3)), (torch.randn(5, 3), torch.full((5,), 3))]
    setup = {"data": data, "faults": fp.BitErrorRate(0.05), "trials": 6, "format": format, "audit": 1.0}
    setup["decision"] = "logits"
    found = fp.assess(Prior(kind), **setup).trials
    if kind == "sliced":
        expected = fp.assess(Prior("cloned"), **setup).trials
        assert found.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    assert (found["masked"] < 13).all()


@pytest.mark.parametrize("kind", ["copied", "computed"])
def test_an_answer_in_a_buffer_that_the_model_writes_is_kept_of_each_batch(kind):
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)
            self.out = torch.zeros(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "copied":
                return self.out.copy_(self.fc(x))
            return torch.mm(x, self.fc.weight.t(), out=self.out)

    class Plain(Buffered):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if kind == "copied" else torch.mm(x, self.fc.weight.t())

    data = [(torch.randn(5, 4), torch.arange(5) % 3) for _ in range(3)]
    setup = {"data": data, "faults": fp.BitErrorRate((3e-3, 5e-2)), "trials": 8, "where": fp.Parameters("fc.*")}
    found, expected = fp.assess(Buffered(), **setup), fp.assess(Plain(), **setup)
    assert found.golden == expected.golden
    assert found.trials.drop(columns="seconds").equals(expected.trials.drop(columns="seconds"))


@pytest.mark.parametrize("verb", ["assess", "protect", "analyze"])
def test_no_verb_runs_where_parameters_are_cached(verb, mlp, blobs):
    packed = fp.pack_(copy.deepcopy(mlp), fp.Affine(bits=8))
    call = {
        "assess": lambda: fp.assess(packed, blobs, faults=fp.BitErrorRate(0.1), trials=3),
        "protect": lambda: fp.protect(mlp, blobs, ber=1e-3),
        "analyze": lambda: fp.analyze(mlp, blobs),
    }[verb]
    with parametrize.cached(), pytest.raises(ConfigError, match=r"inside torch\.nn\.utils\.parametrize\.cached"):
        call()


def test_a_forward_that_caches_by_itself_is_hit(mlp, blobs):
    class Cached(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with parametrize.cached():
                return super().forward(x)

    packed = fp.pack_(copy.deepcopy(mlp), fp.Affine(bits=8))
    setup = {"data": blobs, "faults": fp.BitErrorRate(0.05), "trials": 6}
    found, plain = fp.assess(Cached(*packed), **setup), fp.assess(packed, **setup)
    assert found.trials.drop(columns="seconds").equals(plain.trials.drop(columns="seconds"))
    assert (found.trials["masked"] < 30).any()


def test_a_faulty_forward_that_raises_behind_a_cut_prints_nothing(capfd):
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 3)
            self.register_buffer("at", torch.tensor([0, 3, 5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)[:, self.at])

    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    where = fp.Parameters("at", buffers=True)
    found = fp.assess(Looked(), data, faults=fp.RandomBits(2), where=where, trials=20, audit=0)
    assert (found.trials["due"] == 6).any()
    assert "Traceback" not in capfd.readouterr().err
