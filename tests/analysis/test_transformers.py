"""Analyses of transformers, Hugging Face's too, against one hooked flip a forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.models.transformer import Block

SAMPLES = 3
LIMITED = fp.DeepVigor(factors="exhaustive", ranges=False)


def bert() -> tuple[nn.Module, Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    return model, {"input_ids": torch.randint(0, 13, (SAMPLES, 4)), "attention_mask": torch.ones(SAMPLES, 4)}, "logits"


def vit() -> tuple[nn.Module, Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval(), torch.randn(SAMPLES, 1, 8, 8), "logits"


class Ours(nn.Module):
    """A block with a head on its last token."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(4, 2, causal=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)[:, -1])


def lively(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def classes(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        found = model(**x) if isinstance(x, dict) else model(x)
    scores = getattr(found, "logits", found)
    return torch.where(scores.isnan().any(1), -1, scores.argmax(1))


def hooked(model: nn.Module, x: Any, layer: str, neurons: int) -> Tensor:
    """How many samples of each neuron and bit change the class: one flip of one sample a forward."""
    golden = classes(model, x)
    counts = torch.zeros(neurons, 32, dtype=torch.int32)
    for sample in range(SAMPLES):
        for neuron in range(neurons):
            for bit in range(32):

                def hook(module: nn.Module, args: Any, out: Tensor, at: Any = (sample, neuron, bit)) -> Tensor:
                    rows = out.detach().clone()
                    words = rows[at[0]].reshape(-1).numpy().view(np.uint32)
                    words[at[1]] ^= np.uint32(1 << at[2])
                    return rows

                handle = model.get_submodule(layer).register_forward_hook(hook)
                counts[neuron, bit] += int(classes(model, x)[sample] != golden[sample])
                handle.remove()
    return counts


CASES = {
    "BERT": (bert, "bert.pooler.dense", 8),
    "ViT": (vit, "classifier", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_map_is_that_of_one_flip_a_forward(case):
    build, layer, neurons = CASES[case]
    model, x, output = build()
    lively(model)
    found = fp.analyze(model, [(x, torch.zeros(SAMPLES))], LIMITED, where=fp.Neurons(layer), output=output)
    assert torch.equal(found.layers_found[0].critical, hooked(model, x, layer, neurons))
    assert found.layers_found[0].critical.sum() > 0


@pytest.mark.parametrize("build", [bert, vit])
def test_all_layers_and_weights_are_analysed_and_the_map_validates(build):
    model, x, output = build()
    lively(model)
    data = [(x, torch.zeros(SAMPLES))]
    found = fp.analyze(model, data, fp.DeepVigor(neurons=2, ranges=False), output=output)
    assert found.coverage > 0.8
    assert not [name for name in found.left_out if "activations × activations" not in name]
    weights = fp.analyze(
        model, data, fp.DeepVigor(neurons=2, ranges=False), where=fp.Parameters("classifier.weight"), output=output
    )
    assert weights.of == "parameters"


def test_scores_are_asked_about_like_any_layer():
    """A map of attention's scores, against the same values changed by hand in the kernel's documented steps."""
    model, x = lively(Ours()).eval(), torch.randn(SAMPLES, 3, 4)
    where = fp.Neurons(kinds="scores", exclude="*:scores")
    found = fp.analyze(model, [(x, torch.zeros(SAMPLES))], LIMITED, where=where)
    (layer,) = found.layers_found
    assert layer.name == "block.attention:probabilities"

    def answers(flip: tuple[int, int, int] | None) -> Tensor:
        own, y = model.block.attention, model.block.norm1(x)
        q, k, v = (part(y).unflatten(2, (2, -1)).transpose(1, 2) for part in (own.query, own.key, own.value))
        later = torch.ones(3, 3, dtype=torch.bool).triu(1)
        chances = (q @ k.transpose(2, 3) / 2**0.5).masked_fill(later, -torch.inf).softmax(3)
        if flip is not None:
            chances[flip[0]].view(-1).numpy().view(np.uint32)[flip[1]] ^= np.uint32(1 << flip[2])
        y = x + own.out((chances @ v).transpose(1, 2).flatten(2))
        scores = model.head((y + model.block.mlp(model.block.norm2(y)))[:, -1])
        return torch.where(scores.isnan().any(1), -1, scores.argmax(1))

    with torch.no_grad():
        golden = answers(None)
        expected = torch.zeros(2 * 3 * 3, 32, dtype=torch.int32)
        for sample in range(SAMPLES):
            for value in range(18):
                for bit in range(32):
                    expected[value, bit] += int(answers((sample, value, bit))[sample] != golden[sample])
    assert torch.equal(layer.critical, expected)
    assert expected.sum() > 0
