"""A small GPT over characters (Radford et al. 2019, with LayerNorm before each part)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flipproof.models.transformer import Block, Held


class GPT(nn.Module):
    """Token and position embeddings, causal transformer blocks, LayerNorm and one linear layer; no tied weights."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 tokens (N, T), T ≤ context, to logits (N, vocabulary) of the token that follows the last one."""
        logits: Tensor = self.head(self._hidden(tokens)[:, -1])
        return logits

    def all_positions(self, tokens: Tensor) -> Tensor:
        """int64 tokens (N, T) to logits (N, T, vocabulary): at t those of token t + 1. For training."""
        logits: Tensor = self.head(self._hidden(tokens))
        return logits

    def read_on(self, tokens: Tensor, held: list[Held]) -> Tensor:
        """int64 tokens (N, T) behind those that are `held` to logits (N, vocabulary) of the token that follows.

        Args:
            tokens: the next ones; T and all before are ≤ context together.
            held: keys and values of each block, an empty list of each before the first; these tokens' are added.
        """
        before = held[0][0].shape[2] if held[0] else 0
        x = self.tokens(tokens) + self.positions(torch.arange(before, before + tokens.shape[1], device=tokens.device))
        for block, own in zip(self.blocks, held, strict=True):
            x = block(x, own)
        logits: Tensor = self.head(self.norm(x[:, -1:]))[:, 0]
        return logits

    def _hidden(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        hidden: Tensor = self.norm(self.blocks(x))
        return hidden


def small_gpt(vocabulary: int = 65, context: int = 64) -> GPT:
    """A GPT of width 96 with 4 heads and 3 blocks, untrained: 354,401 parameters for 65 characters.

    Its forward gives one answer a sample, the next character, as a classifier does. `GPT.all_positions` is what it is
    trained by.

    Example:
        >>> model = small_gpt()
        >>> sum(p.numel() for p in model.parameters()), model(torch.zeros(2, 64, dtype=torch.long)).shape
        (354401, torch.Size([2, 65]))
    """
    return GPT(vocabulary, context, width=96, heads=4, depth=3)
