"""Equation (6) against the paper's Table III, and times that are measured."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.overhead import overhead

Spec = list[int | str]


def convolutions(widths: Spec) -> Iterator[nn.Module]:
    inputs = 3
    for width in widths:
        if isinstance(width, str):
            yield nn.MaxPool2d(2)
        else:
            yield from (nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True))
            inputs = width


def vgg16() -> nn.Module:
    """As the paper counts it: no batch normalisation, one linear layer; 13 ReLU."""
    spec: Spec = [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
    return nn.Sequential(*convolutions(spec), nn.Flatten(), nn.Linear(512, 10))


def alexnet() -> nn.Module:
    """As the paper counts it for 32 × 32 images: 7 ReLU."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 192, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)),
    )


def alive(model: nn.Module) -> nn.Module:
    """Biases that keep every layer from dying on two random images."""
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(layer.bias, 0.1)
    return model


TRAINED = {"batch_size": 2, "budget": 0.99, "slack": 2.0}
PUBLISHED: list[tuple[str, int, Hardening, int, float, float]] = [
    ("vgg16", 14_719_818, Ranger(per="neuron"), 276_480, 1.878, 5e-4),
    ("vgg16", 14_719_818, Ranger(), 13, 8.83e-5, 5e-8),
    ("vgg16", 14_719_818, ProAct(epochs=1, epochs_last=1, **TRAINED), 12 + 2048, 0.0140, 5e-5),  # type: ignore[arg-type]
    ("alexnet", 23_272_266, FitAct(epochs=1, **TRAINED), 66_176, 0.284, 5e-4),  # type: ignore[arg-type]
    ("alexnet", 23_272_266, Ranger(), 7, 3.0e-5, 1e-6),
    ("alexnet", 23_272_266, ProAct(epochs=1, epochs_last=1, **TRAINED), 6 + 4096, 0.0176, 5e-5),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("name", "parameters", "method", "thresholds", "percent", "rounding"), PUBLISHED)
def test_table_3(
    name: str, parameters: int, method: Hardening, thresholds: int, percent: float, rounding: float
) -> None:
    model = alive({"vgg16": vgg16, "alexnet": alexnet}[name]())
    data = [(torch.randn(1, 3, 32, 32), torch.tensor([label])) for label in (0, 1, 0)]
    found = overhead(model, harden(model, method, data=data), repeats=0)
    assert (found.parameters, found.thresholds) == (parameters, thresholds)
    assert found.memory_percent == pytest.approx(percent, abs=rounding)
    assert found.bytes == 4 * thresholds
    assert found.time_ratio is None


def test_bytes_follow_the_type_and_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    hardened = harden(model, Ranger(), data=[(torch.randn(8, 4).double(), torch.randint(4, (8,)))])
    found = overhead(model, hardened, repeats=0)
    assert (found.parameters, found.thresholds, found.bytes) == (24, 2, 16)


def test_time_ratio_is_measured() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.004)
            return x

    class Slower(Slow):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(super().forward(x)))

    plain = nn.Sequential(Slow(), nn.Linear(4, 3))
    hardened = nn.Sequential(Slower(), nn.Linear(4, 3))
    ratio = overhead(plain, hardened, inputs=torch.randn(2, 4), repeats=5).time_ratio
    assert ratio is not None
    assert 1.5 < ratio < 8.0  # three times as long, and a busy machine wakes late


def test_inputs_come_from_the_report_where_none_are_given() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
            return torch.relu(self.fc(self.embed(tokens).mean(dim=1))) * scale

    model = Embeds()
    data = [((torch.randint(5, (6, 7)), torch.rand(6, 1)), torch.randint(3, (6,))) for _ in range(2)]
    hardened = harden(model, Ranger(), data=data)
    ratio = overhead(model, hardened).time_ratio
    assert ratio is not None
    assert 0.1 < ratio < 50
    assert overhead(model, model).time_ratio is None


def test_the_wrong_way_round_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    hardened = harden(model, Ranger(), data=[(torch.randn(8, 4), torch.randint(3, (8,)))])
    with pytest.raises(ConfigError, match="original model first"):
        overhead(hardened, model)
