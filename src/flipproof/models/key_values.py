"""Where a model that writes text keeps keys and values of the tokens before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (N, heads, tokens, width) each."""


class KeyValues(nn.Module):
    """A KV cache between two tokens: a model that writes text calls it with its keys and values, save for the last.

    It gives back what it is given. `fp.Cache()` finds it, and writes faults into these tensors, with which the model
    reads on. `flipproof.models.Greedy` has one; a generating module of one's own makes one in its `__init__`.

    Example:
        >>> import torch
        >>> memory = KeyValues()
        >>> keys, values = torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8)  # 2 samples, 4 heads, 7 tokens, 8 wide
        >>> memory([(keys, values)])[0][0] is keys
        True
    """

    def forward(self, pairs: Pairs) -> Pairs:
        """The keys and values that are kept, as they are."""
        return pairs
