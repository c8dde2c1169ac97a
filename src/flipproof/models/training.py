"""A small training loop for the networks of the papers: seeded, so that the same call gives the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof._files import replacing
from flipproof.errors import ConfigError, DataError

Batch = tuple[Tensor, Tensor] | tuple[Mapping[str, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def train_classifier(
    model: nn.Module,
    data: Sequence[Batch],
    *,
    epochs: int,
    lr: float = 1e-3,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
) -> nn.Module:
    """Train in place with Adam; the learning rate follows a cosine down to 0.

    Args:
        model: gives logits (N, classes), or what `loss` takes.
        data: batches, visited in a new order every epoch; a mapping as inputs goes in by keyword.
        epochs: passes over the data.
        lr: initial learning rate.
        loss: of outputs and targets; `risk_loss` for one probability a sample.
        seed: of that order.

    Returns:
        The model, in eval mode.

    Raises:
        DataError: if there is nothing to train on.
    """
    if not data or epochs < 1:
        raise DataError(f"training needs data and at least one epoch, got {len(data)} batches and epochs={epochs}")
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs * len(data))
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(data), generator=order).tolist():
            inputs, targets = data[i]
            optimiser.zero_grad(set_to_none=True)
            outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            torch.autograd.backward(loss(outputs, targets))
            optimiser.step()
            schedule.step()
    return model.eval()


def risk_loss(risks: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of probabilities (N,) against labels 0 and 1 of any number type."""
    return F.binary_cross_entropy(risks, targets.to(risks.dtype))


def cache_folder() -> Path:
    """Where trained weights are kept: `$XDG_CACHE_HOME/flipproof` or `~/.cache/flipproof`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flipproof"


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """The same factory with the same random weights every time; the global generator stays as it is.

    >>> torch.equal(*(seeded(lambda: nn.Linear(3, 2))().weight for _ in range(2)))
    True
    """

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return built


def cached(name: str, build: Callable[[], nn.Module], train: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with weights from the cache, training and caching it the first time.

    A cache file that does not fit the model is trained anew; one that cannot be written is done without.

    Args:
        name: of the cache file, without suffix; change it when the recipe changes.
        build: makes the untrained model.
        train: trains it.
    """
    path = cache_folder() / f"{name}.safetensors"
    model = build()
    if path.exists():
        try:
            model.load_state_dict(load_file(path))
        except (OSError, RuntimeError, ValueError, SafetensorError):  # torn or of another recipe: train anew
            model = build()
        else:
            return model.eval()
    model = train(model)
    # a read-only home costs a few seconds of training next time, nothing else
    with suppress(ConfigError), replacing(path) as temporary:
        save_file(model.state_dict(), temporary)
    return model
