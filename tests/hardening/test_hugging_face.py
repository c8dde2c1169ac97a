"""Activations of Hugging Face's transformers: each is bounded at its output, whatever it computes on the way."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert(activation: str = "gelu") -> nn.Module:
    config = transformers.BertConfig(vocab_size=13, max_position_embeddings=8, hidden_act=activation, **SIZE)
    return transformers.BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZE)).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=13, bos_token_id=None, eos_token_id=None, pad_token_id=None, **SIZE)
    return transformers.LlamaForCausalLM(config).eval()


def ids() -> Tensor:
    return torch.randint(0, 13, (16, 5))


def last(found: Any) -> Tensor:
    return found.logits[:, -1]


BERT = [*(f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)), "bert.pooler.activation"]
CASES: dict[str, tuple[Any, Any, Any, list[str]]] = {
    "BERT": (bert, ids, "logits", BERT),
    "BERT, gelu_new": (lambda: bert("gelu_new"), ids, "logits", BERT),
    "BERT, quick_gelu": (lambda: bert("quick_gelu"), ids, "logits", BERT),
    "ViT": (vit, lambda: torch.randn(16, 3, 8, 8), "logits", [f"vit.layers.{i}.mlp.activation_fn" for i in (0, 1)]),
    "GPT-2": (gpt2, ids, last, [f"transformer.h.{i}.mlp.act" for i in (0, 1)]),
    "Llama": (llama, ids, last, [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)]),
}  # fmt: skip


def hardened(case: str, method: Any = None) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]], Any, list[str]]:
    build, inputs, output, names = CASES[case]
    model, x = build(), inputs()
    data = [(x, torch.arange(16) % 2)]
    return model, fp.harden(model, data, method or fp.Ranger(), output=output), data, output, names


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("case", CASES)
def test_every_activation_is_bounded_at_its_output(case):
    model, safe, data, _, names = hardened(case)
    report = fp.hardening_report(safe)
    assert [site.name for site in report.sites] == [f"{name}:0" for name in names]
    assert not report.unreachable
    assert f"{len(names)} activations bounded" in str(report)
    x = data[0][0]
    assert torch.equal(answers(safe, x), answers(model, x))
    outputs: dict[str, Tensor] = {}
    for name in names:
        safe.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    answers(safe, x)
    highest = {name: float(out.max()) for name, out in outputs.items()}
    with torch.no_grad():  # what feeds the first activation becomes huge: a fault in a high exponent bit
        beside = safe.get_submodule(names[0].rpartition(".")[0])
        next(weight for weight in beside.parameters() if weight.dim() > 1).mul_(1e30)
    answers(safe, x)
    for site in report.sites:
        threshold = float(safe.get_submodule(site.module).threshold)
        name = site.name.removesuffix(":0")
        assert highest[name] <= threshold <= 2 * highest[name]
        assert outputs[name].max() <= threshold


@pytest.mark.parametrize("case", ["BERT, gelu_new", "Llama"])
def test_hardened_models_are_copied_pickled_saved_and_loaded(case, tmp_path: Path):
    model, safe, data, _, _ = hardened(case, fp.Guard())
    x = data[0][0]
    expected = answers(safe, x)
    assert torch.equal(answers(copy.deepcopy(safe), x), expected)
    assert torch.equal(answers(pickle.loads(pickle.dumps(safe)), x), expected)
    fp.save_hardened(safe, tmp_path / "safe.safetensors")
    again = fp.load_hardened(copy.deepcopy(model), tmp_path / "safe.safetensors")
    assert torch.equal(answers(again, x), expected)
    assert isinstance(safe, type(model))


def test_thresholds_are_in_the_fault_space():
    _, safe, data, output, names = hardened("BERT")
    found = fp.assess(safe, data, faults=fp.RandomBits(1), output=output, trials=3, audit=1.0)
    assert found.bits - 32 * sum(p.numel() for p in bert().parameters()) == 32 * 2 * len(names)
