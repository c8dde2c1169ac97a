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
Augment = Callable[[Tensor, torch.Generator], Tensor]


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


def train_onecycle(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    warm_up: float = 0.25,
    augment: Augment | None = None,
    outputs: Callable[[Tensor], Tensor] | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
) -> nn.Module:
    """Train in place with AdamW on samples that are mixed anew every epoch; the learning rate goes up, then down to 0.

    It rises from lr / 25 to lr and falls to almost 0, both along a cosine, while AdamW's first momentum goes from 0.95
    to 0.85 and back (Smith and Topin 2018). Gradients longer than 1 are shortened to 1. What is left over when an epoch
    is cut into batches is left out of that epoch.

    Args:
        model: gives what `loss` takes.
        inputs: all training inputs, (samples, …).
        targets: theirs, (samples, …).
        epochs: passes over the data.
        lr: highest learning rate.
        batch_size: samples a step.
        weight_decay: of parameters with two and more dimensions; biases, scales and thresholds have none.
        warm_up: share of all steps during which the rate rises.
        augment: changes a batch of inputs before it goes in, with the generator that it is given.
        outputs: called instead of the model, such as another method of it.
        loss: of outputs and targets.
        seed: of order and augmentation.

    Returns:
        The model, in eval mode.

    Raises:
        DataError: if there is nothing to train on, or inputs and targets do not match.

    Example:
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> model = train_onecycle(seeded(lambda: nn.Linear(1, 2))(), x, (x[:, 0] > 0).long(), epochs=40, lr=0.2,
        ...                        batch_size=4)
        >>> model(x).argmax(dim=1)
        tensor([0, 0, 1, 1])
    """
    if epochs < 1 or not 0 < batch_size <= len(inputs) or len(inputs) != len(targets):
        raise DataError(
            f"training needs at least one epoch and one batch of inputs with targets, got epochs={epochs}, "
            f"batch_size={batch_size}, {len(inputs)} inputs and {len(targets)} targets"
        )
    random = torch.Generator().manual_seed(seed)
    steps = len(inputs) // batch_size
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
    share = warm_up + 1e-9  # OneCycleLR divides by zero if the rate rises for exactly one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=share)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=random)
        for chosen in torch.split(order[: steps * batch_size], batch_size):
            batch = inputs[chosen] if augment is None else augment(inputs[chosen], random)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss((outputs or model)(batch), targets[chosen]))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


def shifted_and_flipped(images: Tensor, random: torch.Generator, *, pixels: int = 4) -> Tensor:
    """Each image (N, C, H, W) moved by up to so many pixels along both axes, and mirrored every other time.

    What moves in at the border is a mirror image of what is beside it. The result is channels-last in memory.

    >>> images = torch.arange(4.0).reshape(1, 1, 1, 4)
    >>> shifted_and_flipped(images, torch.Generator().manual_seed(0), pixels=0)
    tensor([[[[3., 2., 1., 0.]]]])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="reflect") if pixels else images
    padded = padded.permute(0, 2, 3, 1)  # channels last: one gather of whole pixels
    down, right = (torch.randint(2 * pixels + 1, (count, 1), generator=random) for _ in range(2))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.randint(2, (count, 1), generator=random) == 1
    columns = torch.where(mirrored, columns.flip(1), columns)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits (N, T, vocabulary) against tokens (N, T), over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
