"""Faults in a KV cache, against decode loops written out by hand that flip the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import heads, linear, norm
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.errors import ConfigError, FaultSpaceError, FormatError, ModelError
from flipproof.faults import TrialGenerator
from flipproof.models import Greedy, KeyValues
from flipproof.models.gpt import GPT
from flipproof.spaces.cache import CacheSpace
from flipproof.spaces.contract import Faults, Space
from flipproof.testing import SpaceContract

VOCABULARY, PROMPT, LENGTH, BLOCKS, HEADS, WIDTH = 11, 5, 4, 2, 2, 8
Place = tuple[str, int, int]
Kept = list[list[Tensor]]


def gpt() -> GPT:
    model = GPT(VOCABULARY, 16, WIDTH, HEADS, BLOCKS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def hf_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def prompts(samples: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, PROMPT))


def our_step(model: GPT, tokens: Tensor, kept: Kept) -> Tensor:
    """Read tokens, one after the other, with plain sums over what is kept; logits of the last."""
    for token in tokens.T:
        place = kept[0][0].shape[2] if kept[0] else 0
        x = (model.tokens.weight[token] + model.positions.weight[place])[:, None]
        for block, own in zip(model.blocks, kept, strict=True):
            part, y = block.attention, norm(block.norm1, x)
            q, k, v = (heads(linear(layer, y), HEADS) for layer in (part.query, part.key, part.value))
            own[:] = [torch.cat([own[0], k], 2), torch.cat([own[1], v], 2)] if own else [k, v]
            weights = (q @ own[0].transpose(2, 3) / (WIDTH / HEADS) ** 0.5).softmax(-1)
            x = x + linear(part.out, (weights @ own[1]).permute(0, 2, 1, 3).flatten(2))
            wide = F.gelu(linear(block.mlp[0], norm(block.norm2, x)))
            x = x + linear(block.mlp[2], wide)
        logits = linear(model.head, norm(model.norm, x))[:, 0]
    return logits


def hf_step(model: nn.Module, tokens: Tensor, kept: Any) -> Tensor:
    """One call of Hugging Face's model, whose cache is then at hand."""
    transformers = pytest.importorskip("transformers")
    if not kept:
        kept.append(transformers.DynamicCache(config=model.config))
    name = "cache" if hasattr(model(tokens, use_cache=True), "cache") else "past_key_values"
    return model(tokens, use_cache=True, **{name: kept[0]}).logits[:, -1]


def tensors(kept: Any) -> list[list[Tensor]]:
    return kept if isinstance(kept[0], list) else [[layer.keys, layer.values] for layer in kept[0].layers]


def by_hand(
    step: Any, model: nn.Module, x: Tensor, faults: list[Place], stored: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Greedy decoding that flips these bits in the cache of every sample, each once its word is written."""
    kept: Any = [[] for _ in range(BLOCKS)] if step is our_step else []
    given, found = x, []
    for number in range(LENGTH):
        logits = step(model, given, kept)
        found.append(logits)
        given = logits.argmax(1, keepdim=True)
        here = tensors(kept)
        if stored is not None:
            for pair in here:
                for one in pair:
                    new = slice(0, PROMPT) if number == 0 else slice(PROMPT + number - 1, None)
                    one[:, :, new] = stored(one[:, :, new])
        for name, value, bit in faults:
            _, layer, part, phase = name.split(".")
            steps = PROMPT if phase == "prefill" else LENGTH - 2
            head, token, column = np.unravel_index(value, (HEADS, steps, WIDTH // HEADS))
            written = 0 if phase == "prefill" else token + 1
            if number == written:
                place = token if phase == "prefill" else PROMPT + token
                held = here[int(layer)][part == "value"]
                for sample in range(len(x)):
                    word = held[sample, head, place, column].numpy().view(np.uint32)
                    held[sample, head, place, column] = float((word ^ np.uint32(1 << bit)).view(np.float32))
    return torch.stack(found, 1)


def space_of(model: nn.Module, x: Tensor, where: fp.Cache, format: Any = None) -> CacheSpace:
    with torch.no_grad():
        return where.space(model, format, [(lambda: model(x), len(x))])


@pytest.mark.parametrize(("build", "step"), [(gpt, our_step), (hf_gpt2, hf_step)])
def test_flips_are_those_of_a_decode_loop_by_hand(build, step):
    net, x = build(), prompts()
    model = Greedy(net, LENGTH).eval()
    space = space_of(model, x, fp.Cache())
    assert {site.name for site in space.sites} == {
        f"memory.{layer}.{part}.{phase}"
        for layer in range(BLOCKS) for part in ("key", "value") for phase in ("prefill", "decode")
    }  # fmt: skip
    assert space.bits == BLOCKS * 2 * (PROMPT + LENGTH - 2) * WIDTH * 32
    moved = 0
    with torch.no_grad(), space.stored():
        golden = model(x).clone()
        assert torch.allclose(golden, by_hand(step, net, x, []), rtol=1e-4, atol=1e-5)
        for number, site in enumerate(space.sites):
            generator = TrialGenerator(0, site.name, 0)
            for flips in (1, 3):
                draw = Faults(site.offset + generator.distinct(flips, site.bits))
                with space.corrupted(draw) as changed:
                    found = model(x)
                assert changed == flips
                expected = by_hand(step, net, x, space.places(draw))
                assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True), (site.name, number)
                moved += not torch.equal(found, golden)
                first = 1 if site.name.endswith("prefill") else 2  # what was written before is as it was
                assert torch.equal(found[:, :first], golden[:, :first])
        draw = Faults(TrialGenerator(0, "many", 0).distinct(40, space.bits))
        with space.corrupted(draw):
            found = model(x)
        assert torch.allclose(found, by_hand(step, net, x, space.places(draw)), rtol=1e-3, atol=1e-4, equal_nan=True)
        assert torch.equal(model(x), golden)
    assert moved > len(space.sites)


def test_a_format_stores_what_is_written_from_then_on():
    net, x = gpt(), prompts()
    model, fmt = Greedy(net, LENGTH).eval(), fp.FixedPoint(3, 4)
    space = space_of(model, x, fp.Cache(), fmt)
    assert space.bits == BLOCKS * 2 * (PROMPT + LENGTH - 2) * WIDTH * 8

    def rounded(values: Tensor) -> Tensor:
        return (values * 16).round().clamp(-128, 127) / 16

    with torch.no_grad():
        plain = model(x)
        with space.stored():
            found = model(x)
        expected = by_hand(our_step, net, x, [], rounded)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-3)
        site = space.sites[0]
        with space.stored(), space.corrupted(Faults(np.array([site.offset + 7]))):  # the sign of the first key
            kept: list[Tensor] = []
            handle = model.memory.register_forward_hook(lambda module, args, pairs: kept.append(pairs[0][0].clone()))
            model(x)
            handle.remove()
        value = rounded(kept[0])[:, 0, 0, 0]
        assert ((value - kept[0][:, 0, 0, 0]).abs() == 0).all()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_campaign_is_the_same_with_workers_and_audited(phase):
    model = Greedy(gpt(), LENGTH)
    data = [(prompts(4), torch.arange(4)), (prompts(2), torch.arange(2))]
    setup: dict[str, Any] = {
        "faults": fp.BitErrorRate([1e-3, 1e-2]), "where": fp.Cache(phase), "trials": 6, "output": _last, "audit": 1.0,
    }  # fmt: skip
    one, two = fp.assess(model, data, **setup), fp.assess(model, data, **setup, workers=2)
    assert [{**a.to_json(), "seconds": 0} for a in one.records] == [{**b.to_json(), "seconds": 0} for b in two.records]
    words = PROMPT if phase == "prefill" else LENGTH - 2
    assert one.bits == BLOCKS * 2 * words * WIDTH * 32
    assert one.coverage == words / (PROMPT + LENGTH - 2)
    assert one.trials["masked"].sum() < one.trials["samples"].sum()


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1]


def test_what_cannot_be_hit_is_said():
    x = prompts()
    with pytest.raises(FaultSpaceError, match=r"GPT has none that can be seen: wrap the language model"):
        space_of(gpt(), x, fp.Cache())
    with pytest.raises(FaultSpaceError, match=r"selects nothing of the KV cache"):
        space_of(Greedy(gpt(), 2).eval(), x, fp.Cache("decode"))  # the first token written is the last but one
    with pytest.raises(FaultSpaceError, match=r"phase must be among"):
        fp.Cache("both")
    model = Greedy(gpt(), LENGTH).eval()
    with pytest.raises(FaultSpaceError, match=r"prompts have to be of one length"), torch.no_grad():
        fp.Cache().space(model, None, [(lambda: model(x), 3), (lambda: model(x[:, 1:]), 3)])
    with pytest.raises(FaultSpaceError, match=r"got stuck bits"):
        fp.assess(model, [(x, torch.arange(3))], faults=fp.StuckAt(1e-2), where=fp.Cache(), output=_last, trials=1)
    with pytest.raises(FormatError, match=r"a neuron's output is a word by itself|a scale a channel"):
        space_of(model, x, fp.Cache(), fp.SECDED(fp.Float16(), block=48))
    with pytest.raises(ConfigError, match=r"length= 1 token or more"):
        Greedy(gpt(), 0)
    with pytest.raises(ModelError, match=r"Greedy takes a causal language model that gives a cache"):
        Greedy(_Plain(), 2)(x)


class _Plain(nn.Module):
    """A model without a cache."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        class Found:
            logits = torch.zeros(*input_ids.shape, VOCABULARY)

        return Found()


class Fixed(nn.Module):
    """A cache of fixed size, whose words are written one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = KeyValues()

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.zeros(len(x), 1, 8, 2)
        for _ in range(3):
            self.memory([(keys, keys.clone())])
        return x


def test_a_cache_of_fixed_size_is_refused():
    with pytest.raises(FaultSpaceError, match=r"a cache of fixed size, or of a sliding window"):
        space_of(Fixed(), torch.zeros(2, 1), fp.Cache())


class TestCache(SpaceContract):
    where, format = fp.Cache(), None

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Greedy(gpt(), LENGTH).eval()

    def space(self, network: nn.Module) -> Space:
        return space_of(network, torch.arange(3 * PROMPT).reshape(3, PROMPT) % VOCABULARY, self.where, self.format)

    def run(self, network: nn.Module) -> Tensor:
        return network(torch.arange(3 * PROMPT).reshape(3, PROMPT) % VOCABULARY)


class TestSomeOfIt(TestCache):
    where = fp.Cache("decode", kinds="value", exclude="memory.0")


class TestQuantised(TestCache):
    format = fp.FixedPoint(3, 4)
