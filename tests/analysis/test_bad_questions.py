"""What an analysis cannot work on is refused in one sentence; what people really pass, works."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp

FEW = fp.DeepVigor(neurons=3, holes=4, ranges=False)
Y = torch.arange(6) % 3


class ModelOutput(OrderedDict):
    """As in Hugging Face's transformers: a dictionary of what is not None, a tuple, and attributes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class Classified(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Attention(nn.Module):
    """Projections are modules, the attention itself is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = (f(x).view(batch, steps, 2, 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, steps, width))


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.attention = nn.Embedding(20, 8), Attention()
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **kwargs) -> Classified:
        x = self.embeddings(input_ids)
        mask = None
        if attention_mask is not None:
            mask = (1 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        x = self.norm(x + self.attention(x, mask))
        return Classified(logits=self.classifier(x[:, 0]), hidden_states=(x,))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.attention, self.classifier = Attention(), nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, head_mask=None) -> Classified:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return Classified(logits=self.classifier((x + self.attention(x))[:, 0]))


class Detector(nn.Module):
    """As ssdlite: a list of dictionaries, whose boxes may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        found = self.head(self.body(images).mean((2, 3)))
        return [{"boxes": row[None, :4][:0], "scores": row[4:5][:0]} for row in found]


TOKENS = [({"input_ids": torch.randint(0, 20, (6, 5)), "attention_mask": torch.ones(6, 5, dtype=torch.int64)}, Y)]
IMAGES = [(torch.randn(6, 3, 8, 8), Y)]
ROWS = [(torch.randn(6, 4), Y)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("output", ["logits", 0, lambda found: found.logits], ids=["key", "index", "function"])
@pytest.mark.parametrize(("build", "data"), [(Bert, TOKENS), (ViT, IMAGES)], ids=["bert", "vit"])
def test_models_like_hugging_faces_are_analysed_and_say_what_is_missing(build, data, output):
    found = fp.analyze(build(), data, FEW, output=output)
    assert {"attention.query", "attention.out", "classifier"} <= set(found.layers["layer"])
    assert list(found.left_out) == ["attention (activations × activations)"]
    assert 0.7 < found.coverage < 1
    table = fp.estimate_factors(build(), data, output=output, margin=0.2)
    assert table.attrs["left_out"] == found.left_out
    assert table.attrs["coverage"] == found.coverage


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(mlp())


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, torch.qint8)


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "a class without output=": (lambda: fp.analyze(Bert(), TOKENS, FEW), r"keys \['logits', 'hidden_states'\]; pass"),
    "another key": (lambda: fp.analyze(Bert(), TOKENS, FEW, output="scores"), r"'scores' does not fit.*'logits'"),
    "an attribute that is not there": (
        lambda: fp.analyze(Bert(), TOKENS, FEW, output=lambda found: found.scores),
        r"output= raises AttributeError.*keys \['logits'",
    ),
    "boxes": (lambda: fp.analyze(Detector(), IMAGES, FEW), r"a detector's boxes: say task=fp.Detection"),
    "no box to take": (
        lambda: fp.analyze(Detector(), IMAGES, FEW, output=lambda found: found[0]["boxes"][0]),
        r"output= raises IndexError.*a detector's boxes",
    ),
    "neurons to propagation": (
        lambda: fp.propagation(mlp(), ROWS, faults=fp.RandomBits(1), where=fp.Neurons()),
        r"propagation takes where=fp\.Parameters\(…\), got a Neurons",
    ),
    "a string as where": (
        lambda: fp.analyze(mlp(), ROWS, where="weight"),
        r"where=fp\.Neurons\(…\) or fp\.Parameters\(…\), got a str: 'weight'",
    ),
    "a string as format": (lambda: fp.estimate_factors(mlp(), ROWS, format="Float32"), r"format=.*got a str: 'Fl"),
    "a string in a mapping": (lambda: fp.analyze(mlp(), ROWS, format={"*": "x"}), r"format=.*got a str: 'x'"),
    "no fault model": (lambda: fp.propagation(mlp(), ROWS, faults="x"), r"faults= a fault model.*got 'x'"),
    "no method": (lambda: fp.analyze(mlp(), ROWS, "search"), r"takes fp\.DeepVigor\(…\) as its method, got 'search'"),
    "no module": (lambda: fp.analyze(print, ROWS), r"takes a torch\.nn\.Module, got <built-in"),
    "script": (lambda: fp.analyze(scripted(), ROWS), r"cannot look into this model: it is a TorchScript module"),
    "script within": (
        lambda: fp.propagation(nn.Sequential(scripted()), ROWS, faults=fp.RandomBits(1)),
        r"cannot look into 0: it is a TorchScript module",
    ),
    "quantised": (lambda: fp.analyze(quantised(), ROWS), r"'0': 'its weight is quantised and packed \(torch\.ao\)"),
    "propagation of nothing": (
        lambda: fp.propagation(mlp(), [(torch.randn(6, 3), Y)], faults=fp.RandomBits(1)),
        "the model rejects batch 0: RuntimeError",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_one_sentence_says_what_came_and_what_to_do(case):
    act, message = CASES[case]
    with pytest.raises(fp.FlipproofError, match=message) as caught:
        act()
    assert "Traceback" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_beside_others_are_named_with_their_share():
    net = nn.Sequential(nn.Linear(4, 4), quantised())
    found = fp.analyze(net, ROWS, FEW)
    assert found.left_out.keys() == {"1.0", "1.2"}
    assert found.coverage == pytest.approx(16 / (16 + 20 + 15))


class Masked(nn.Module):
    """A layer whose outputs are integers, and a Linear that only functions use."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used.weight)


def test_a_model_that_calls_no_layer_has_nothing_to_compare():
    with pytest.raises(fp.FlipproofError, match=r"none of the layers \['used'\] gives a floating-point tensor"):
        fp.propagation(Masked(), ROWS, faults=fp.RandomBits(1))
