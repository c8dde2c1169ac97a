"""The five-layer perceptron of DeepVigor's MNIST experiments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def mlp(
    num_classes: int = 10,
    *,
    inputs: int = 28 * 28,
    hidden: Sequence[int] = (256, 128, 64, 32),
    activation: Literal["relu", "sigmoid"] = "relu",
) -> nn.Sequential:
    """Linear layers with one activation between them; flattens its input (N, …) to (N, inputs).

    The paper says five layers and no widths; these are ours.

    Raises:
        ValueError: if the activation is unknown.

    Example:
        >>> mlp(3, inputs=4, hidden=(5,), activation="sigmoid")
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=4, out_features=5, bias=True)
          (2): Sigmoid()
          (3): Linear(in_features=5, out_features=3, bias=True)
        )
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp takes activation 'relu' or 'sigmoid', got {activation!r}")
    layers: list[nn.Module] = [nn.Flatten()]
    widths = [inputs, *hidden]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
