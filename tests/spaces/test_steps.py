"""Values that functions compute, against transformers and recurrent layers written out by hand with one flipped bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import Hand, bert, gpt2, recurrent, self_attention, torch_encoder, torchvision_vit, vit
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.errors import FaultSpaceError
from flipproof.faults import TrialGenerator
from flipproof.models.transformer import Block
from flipproof.running.data import read_batches
from flipproof.running.neurons import neuron_space
from flipproof.running.resume import Suffixes
from flipproof.spaces.contract import Upsets
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.sites import Fold

transformers = pytest.importorskip("transformers")

SAMPLES = 3
FUSED = ("conv", "linear", "embedding", "norm", "activation", "residual", "query", "key", "value", "context")
BITS = (20, 24, 28, 30, 31)


def hf_gpt2(attention: str = "eager") -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config)


def hf_bert(attention: str = "eager") -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, attn_implementation=attention,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def hf_vit(attention: str = "eager") -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, attn_implementation=attention,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def tv_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2)


def tokens() -> Tensor:
    return torch.randint(0, 13, (SAMPLES, 5))


def images(channels: int = 1) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, channels, 8, 8)


def sequences() -> Tensor:
    return torch.randn(SAMPLES, 4, 8)


def logits(found: Any) -> Tensor:
    return found.logits


def whole(found: Any) -> Tensor:
    return found


def first(found: Any) -> Tensor:
    return found[0]


CASES: dict[str, tuple[Any, ...]] = {
    "GPT-2": (hf_gpt2, gpt2, tokens, logits),
    "BERT": (hf_bert, bert, tokens, logits),
    "ViT": (hf_vit, vit, images(), logits),
    "torchvision ViT": (tv_vit, torchvision_vit, images(3), whole),
    "TransformerEncoder": (encoder, torch_encoder, sequences, whole),
    "LSTM": (lambda: nn.LSTM(8, 3, num_layers=2, batch_first=True), recurrent, sequences, first),
    "LSTM, both ways": (lambda: nn.LSTM(8, 3, bidirectional=True, batch_first=True), recurrent, sequences, first),
    "GRU": (lambda: nn.GRU(8, 3, num_layers=2, bidirectional=True, batch_first=True), recurrent, sequences, first),
}


def lively(model: nn.Module) -> nn.Module:
    """In eval mode, with weights so large that faults show, and biases and scales that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def space_of(model: nn.Module, x: Tensor, output: Any, kinds: Any = (), **where: Any) -> NeuronSpace:
    with torch.no_grad():
        return neuron_space(
            model, read_batches([(x, torch.zeros(len(x)))], torch.device("cpu")), fp.Neurons(kinds=kinds, **where),
            None, output,
        )  # fmt: skip


def check(
    model: nn.Module, by_hand: Any, x: Tensor, output: Any, space: NeuronSpace, seed: int = 0, attention: str = "eager"
) -> None:
    """A fault at every site, of one sample: its answer is that of the forward by hand; the other samples keep bits."""
    moved = 0
    with torch.no_grad(), space.stored():
        golden = output(model(x)).clone()
        expected = by_hand(model, x, Hand(attention=attention))
        room = 1e-4 * float(golden.abs().max())
        assert torch.allclose(golden, expected, rtol=1e-4, atol=room)
        for number, site in enumerate(space.sites):
            generator = TrialGenerator(seed, site.name, 0)
            sample, place = int(generator.below(SAMPLES, 1)[0]), int(generator.below(site.values, 1)[0])
            bit = BITS[number % len(BITS)]
            fault = Upsets(np.full(SAMPLES, site.offset + place * 32 + bit))
            assert space.places(fault)[0] == (site.name, place, bit)
            space.begin(0)
            with space.corrupted(fault), space.only([sample]):
                found = output(model(x))
            expected = by_hand(model, x, Hand((site.name, sample, place, bit), attention))
            others = torch.arange(SAMPLES) != sample
            assert torch.equal(found[others], golden[others]), site.name
            close = torch.isclose(found, expected, rtol=1e-3, atol=room, equal_nan=True)
            assert close.all(), (site.name, place, bit, found[sample], expected[sample])
            moved += not torch.allclose(found, golden, rtol=1e-3, atol=10 * room)
    assert moved > len(space.sites) / 3


@pytest.mark.parametrize("case", CASES)
def test_a_flip_at_every_site_is_that_of_the_net_by_hand(case):
    build, by_hand, inputs, output = CASES[case]
    model, x = lively(build()), inputs()
    space = space_of(model, x, output)
    hand = Hand()
    with torch.no_grad():
        by_hand(model, x, hand)
    assert {site.name: site.shape for site in space.sites} == hand.seen
    check(model, by_hand, x, output, space)
    check(model, by_hand, x, output, space, seed=1)


@pytest.mark.parametrize(
    ("build", "by_hand", "inputs"), [(hf_gpt2, gpt2, tokens), (hf_bert, bert, tokens), (hf_vit, vit, images())]
)
def test_fused_attention_shows_what_it_takes_and_gives(build, by_hand, inputs):
    model, x = lively(build("sdpa")), inputs()
    space = space_of(model, x, logits, FUSED)
    assert not any(site.name.endswith((":scores", ":probabilities")) for site in space.sites)
    assert len([site for site in space.sites if site.name.endswith((":query", ":key", ":value", ":context"))]) == 8
    check(model, by_hand, x, logits, space, attention="fused")


@pytest.mark.parametrize(("build", "by_hand", "inputs"), [(hf_gpt2, gpt2, tokens), (hf_bert, bert, tokens)])
def test_fused_attention_is_taken_apart_for_its_scores(build, by_hand, inputs):
    model, x = lively(build("sdpa")), inputs()
    space = space_of(model, x, logits)
    assert len([site for site in space.sites if site.name.endswith((":scores", ":probabilities"))]) == 4
    with torch.no_grad():
        fused = model(x).logits
        with space.stored():
            assert torch.allclose(model(x).logits, fused, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x).logits, fused)
    check(model, by_hand, x, logits, space, attention="apart")


class Attending(nn.Module):
    """Attention that also gives its weights: heads of all samples lie in one axis."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0]


def attending(model: nn.Module, x: Tensor, hit: Hand) -> Tensor:
    return self_attention(hit, "attention", model.attention, x)


def test_heads_and_tokens_that_lie_in_one_axis_with_samples_are_told_apart():
    model, x = lively(Attending()), sequences()
    space = space_of(model, x, whole)
    folds = {site.name: site.fold for site in space.sites if site.fold is not None}
    assert folds["attention:query"] == Fold(0, 1, 2)  # two heads of each sample, one sample behind the other
    assert folds["attention:linear[1]"] == Fold(0, 4, 1)  # the samples of each of four tokens
    # PyTorch scales the queries before the product here: the site is what the product takes
    check(model, attending, x, whole, space_of(model, x, whole, exclude="*:query"))


class Twisted(nn.Module):
    """Rows of all samples in one axis, in an order that the values do not show."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.ones(len(x) * 4, 3) @ torch.ones(3, 3)
        return x.sum((1, 2))[:, None] + rows.reshape(len(x), -1)[:, :3]


def test_what_values_do_not_tell_is_left_out():
    with pytest.raises(FaultSpaceError, match=r"no axis of its output \(12, 3\) counts samples"):
        space_of(Twisted(), sequences(), whole, ["functional"])


class Functional(nn.Module):
    """A convolution, a tied linear layer and products as functions; activations and a norm too; one sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.table = nn.Parameter(torch.randn(2, 1, 3)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(x[:, None], self.kernel, padding=1)
        y = F.layer_norm(y, (6,))
        y += torch.tanh(y)
        return F.linear(F.gelu(y).sum(1), self.table) @ self.table.narrow(1, 0, 5)


def functional(model: nn.Module, x: Tensor, hit: Hand) -> Tensor:
    y = hit(":conv1d", F.conv1d(x[:, None], model.kernel, padding=1))
    y = hit(":layer_norm", F.layer_norm(y, (6,)))
    y = hit(":residual", y + hit(":tanh", y.tanh()))
    z = hit(":linear", hit(":gelu", F.gelu(y)).sum(1) @ model.table.T)
    return hit(":matmul", z @ model.table[:, :5])


def test_functions_called_in_a_forward():
    model, x = Functional().eval(), torch.randn(SAMPLES, 6)
    space = space_of(model, x, whole)
    assert [site.name for site in space.sites] == [
        ":conv1d", ":layer_norm", ":tanh", ":residual", ":gelu", ":linear", ":matmul"
    ]  # fmt: skip
    check(model, functional, x, whole, space)
    assert [site.name for site in space_of(model, x, whole, "functional", exclude="*:matmul").sites] == [
        ":conv1d", ":linear"
    ]  # fmt: skip


class Cells(nn.Module):
    """A cell called once a step."""

    def __init__(self, kind: type[nn.LSTMCell] | type[nn.GRUCell]) -> None:
        super().__init__()
        self.cell = kind(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells_show_their_gates_at_every_call(kind):
    model, x = lively(Cells(kind)), sequences()
    whole_layer = (nn.LSTM if kind is nn.LSTMCell else nn.GRU)(8, 3, batch_first=True).eval()
    with torch.no_grad():
        for name, parameter in model.cell.named_parameters():
            getattr(whole_layer, f"{name}_l0").copy_(parameter)

    def by_hand(model: nn.Module, x: Tensor, hit: Hand) -> Tensor:
        inner = Hand()
        if hit.fault is not None:
            name, *rest = hit.fault
            role, _, number = name.removeprefix("cell:").partition("[")
            inner.fault = (f":{role}_l0{f'[{number}' if number else ''}", *rest)
        return recurrent(whole_layer, x, inner)[:, -1]

    space = space_of(model, x, whole)
    roles = ("gates", "cell") if kind is nn.LSTMCell else ("gates", "candidate", "state")
    assert {site.name for site in space.sites} == {
        f"cell:{role}{f'[{t}]' if t else ''}" for role in roles for t in range(4)
    }
    check(model, by_hand, x, whole, space)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 4), batch_first=True)
        return self.out(self.lstm(packed)[1][0][-1])


def test_what_is_not_there_is_said():
    space = space_of(Packed().eval(), sequences(), whole)
    assert "reads a packed sequence" in space.left_out["lstm:gates"]
    space = space_of(hf_gpt2().eval(), tokens(), logits)
    assert "counts samples" in space.left_out["transformer.wpe"]
    space = space_of(encoder().eval(), sequences(), whole, ["linear", "scores"], exclude="*:probabilities")
    assert space.left_out["layers.0.self_attn:probabilities"] == "not selected by where="
    with pytest.raises(FaultSpaceError, match=r"it takes values of these kinds that the forward computes"):
        space_of(nn.Linear(8, 3).eval(), sequences(), whole, "scores")
    with pytest.raises(FaultSpaceError, match=r"kinds must be among"):
        fp.Neurons(kinds="attention")


def test_layers_alone_are_written_as_they_always_were_and_drawn_so():
    """Journals of before there were other kinds are gone on with."""
    assert repr(fp.Neurons("fc")) == "Neurons(include=('fc',), exclude=())"
    assert fp.Neurons(kinds=("recurrent", "linear", "conv")) == fp.Neurons()
    assert eval(repr(fp.Neurons(kinds=())), vars(fp) | {"Neurons": fp.Neurons}) == fp.Neurons(kinds=())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)
        )
        x = torch.randn(4, 1, 4, 4)
    found = fp.assess(net, [(x, torch.arange(4) % 3)], faults=fp.RandomBits(1), where=fp.Neurons(), trials=3, seed=7)
    assert [record.digest for record in found.records] == PINNED


PINNED = ["3d69b86ea49b2a87", "49bc1482b18efa9d", "baf3a830cad42c4e"]
"""As drawn by the version before."""


class Small(nn.Module):
    """Embeddings and a causal block, as the small GPT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.head = nn.Embedding(13, 8), Block(8, 2, causal=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.words(tokens))[:, -1])


@pytest.mark.parametrize(
    ("kinds", "format"),
    [((), None), (("norm", "embedding", "activation"), None), (("residual", "scores"), fp.FixedPoint(6, 9))],
)
def test_a_campaign_is_audited_and_the_same_with_workers_and_without_cuts(kinds, format):
    model = lively(Small())
    data = [(tokens(), torch.arange(SAMPLES)), (tokens()[:2], torch.arange(2))]
    setup: dict[str, Any] = {
        "faults": fp.RandomBits(1), "where": fp.Neurons(kinds=kinds), "format": format, "trials": 4, "audit": 1.0,
    }  # fmt: skip
    found = [
        [{**record.to_json(), "seconds": 0} for record in fp.assess(model, data, **setup, **more).records]
        for more in ({}, {"cache_bytes": 0}, {"workers": 2})
    ]
    assert found[0] == found[1] == found[2]
    assert {record["where"][0][0] for record in found[0]} - {"words", "head"}


def test_hugging_face_models_are_assessed_and_come_back_as_they_were():
    model = lively(hf_bert("sdpa")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [({"input_ids": tokens(), "attention_mask": torch.ones(SAMPLES, 5)}, torch.tensor([0, 1, 0]))]
    found = fp.assess(
        model, data, faults=fp.BitPosition([30]), where=fp.Neurons(kinds=("scores", "residual")), output="logits",
        trials=4, audit=1.0,
    )  # fmt: skip
    assert found.summary["critical_total"].iloc[0] + found.summary["due"].iloc[0] > 0
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_hooked_model_travels_with_its_mode():
    """As a cluster sends it: in the worker's thread, with no context entered there."""
    cloudpickle = pytest.importorskip("cloudpickle")
    model, x = lively(Small()), tokens()
    space = space_of(model, x, whole)
    draw = Upsets(TrialGenerator(0, "travel", 0).below(space.bits, SAMPLES))
    again = space.again(model)
    with torch.no_grad(), again.stored():
        sent = cloudpickle.dumps((model, again))
        with again.corrupted(draw):
            again.begin(0)
            expected = model(x)
    there: list[Tensor] = []

    def work() -> None:
        model_there, space_there = cloudpickle.loads(sent)
        with torch.no_grad(), space_there.corrupted(draw):
            space_there.begin(0)
            there.append(model_there(x))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with torch.no_grad():
        assert not torch.equal(expected, model(x))
    assert torch.equal(there[0], expected)


def test_an_exception_in_a_forward_takes_the_mode_along():
    model, x = lively(Small()), tokens()
    space = space_of(model, x, whole)
    with torch.no_grad(), space.stored():
        golden = model(x)
        with pytest.raises(IndexError):
            model(x + 100)
        assert torch.overrides._get_current_function_mode() is None
        assert torch.equal(model(x), golden)


@pytest.mark.parametrize("kinds", [FUSED, ("functional", "residual", "norm", "activation")])
def test_trials_start_where_a_trace_holds_the_value(kinds, monkeypatch):
    """Records are those of whole runs, and cuts are really used, at every kind of value."""
    model, x = lively(Eager()), torch.randn(SAMPLES, 4, 8)
    data = [(x, torch.arange(SAMPLES)), (torch.randn(2, 4, 8), torch.arange(2))]
    used: set[str] = set()
    resume, point = Suffixes.resume_changed, Suffixes.point_of

    def resumed(self: Suffixes, *args: Any, **kwargs: Any) -> Any:
        used.add("node" if kwargs.get("node") is not None else "layer")
        return resume(self, *args, **kwargs)

    def asked(self: Suffixes, site: str) -> Any:
        found = point(self, site)
        used.update([] if found is None else [site])
        return found

    monkeypatch.setattr(Suffixes, "resume_changed", resumed)
    monkeypatch.setattr(Suffixes, "point_of", asked)
    setup: dict[str, Any] = {
        "faults": fp.RandomBits(1), "where": fp.Neurons(kinds=kinds), "trials": 40, "audit": 0.1, "seed": 2,
    }  # fmt: skip
    cut = fp.assess(model, data, **setup)
    assert "node" in used
    roles = {site.partition(":")[2].partition("[")[0] for site in used if ":" in site}
    hit = {record.where[0][0] for record in cut.records}
    assert roles == {site.partition(":")[2].partition("[")[0] for site in hit if ":" in site}
    assert len(roles) > 2
    whole_runs = fp.assess(model, data, **setup, cache_bytes=0)
    assert [{**a.to_json(), "seconds": 0} for a in cut.records] == [
        {**b.to_json(), "seconds": 0} for b in whole_runs.records
    ]


class Eager(nn.Module):
    """Fused attention, attention step by step, a tied product, functions and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.mix, self.norm, self.head = (
            Block(8, 2, causal=True),
            nn.Linear(8, 24),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=2)
        mixed = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v
        x = x + F.gelu(mixed)
        y = F.layer_norm(x, (8,))
        y += torch.tanh(x)
        return F.linear(y[:, -1], self.head.weight) * 2
