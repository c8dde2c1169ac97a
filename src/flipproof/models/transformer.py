"""The transformer block (Vaswani et al. 2017) that the small ViT and the small GPT share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Held = list[Tensor]
"""Keys and values (N, heads, T, width a head) of the tokens that were read before; empty before the first."""


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer each for queries, keys, values and the result."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, held: Held | None = None) -> Tensor:
        """Tokens (N, T, width) to the same shape; if causal, token t sees tokens 0…t, and those that are `held`.

        Their keys and values go to `held` behind the others.
        """
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if held:
            key, value = (torch.cat(both, dim=2) for both in zip(held, (key, value), strict=True))
            sees = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device).tril(held[0].shape[2])
            seen = F.scaled_dot_product_attention(query, key, value, attn_mask=sees)
        else:
            seen = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        if held is not None:
            held[:] = key, value
        mixed: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention, then two linear layers with GELU between; LayerNorm before each of the two, shortcuts around them."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, held: Held | None = None) -> Tensor:
        """Tokens (N, T, width) to the same shape; see `Attention` for what is `held`."""
        x = x + self.attention(self.norm1(x), held)
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed
