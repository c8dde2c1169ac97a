"""What a causal language model makes of the answers of a multiple-choice question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flipproof.errors import DataError, ModelError
from flipproof.models.gpt import GPT

NOT_COUNTED = -100
"""Stands where the token that follows is not of the answer: what torch's cross entropy leaves out, too."""
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
"""What Hugging Face's configurations call the longest input, in the order in which lm-eval asks for them."""


class Choices(nn.Module):
    """A language model that scores K answers to each question, as a classifier scores K classes.

    The score of an answer is the sum of log p(token | all before it) over its tokens, in nats; with `lengths`, that sum
    divided by the answer's length. What is not there scores −∞: a question may have fewer answers than others.
    Logarithms are taken and summed in float64.

    The model reads the first answers of all questions, then the second ones, and so on: each of its layers is called K
    times, and counts questions as samples, as `fp.Neurons()` needs it.

    Rows are padded at their end, and no mask is given: a causal model looks at nothing that comes later. Only a NaN or
    an infinity that a fault makes at the padding itself can come back, as attention multiplies it by 0; a model that is
    run in padded batches has that in use, too.

    Args:
        model: a causal language model of Hugging Face, or any module that gives logits (rows, T, vocabulary) of int64
            tokens (rows, T), as they are or as its ``logits``; also a `flipproof.models.small_gpt`.

    Source:
        Biderman et al. 2024; lm-evaluation-harness computes the same (`HFLM.loglikelihood`).

    Example:
        >>> from flipproof.models import small_gpt
        >>> model = Choices(small_gpt(vocabulary=65)).eval()
        >>> question = torch.tensor([[[5, 6, 7]]])  # two answers of one token to one question: read once
        >>> answers = torch.tensor([[[-100, -100, 8], [-100, -100, 9]]])
        >>> model(question, answers).shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, continuation: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of K answers to each of N questions, float64 (N, K).

        Args:
            input_ids: int64 (N, K, T), a question and its answer a row, without the last token; or (N, 1, T), if the
                rows of each question are the same (answers of one token).
            continuation: int64 (N, K, T), at each place the token that follows, where that is of the answer, and −100
                everywhere else; −100 everywhere for an answer that is not there.
            lengths: (N, K), what each sum is divided by.

        Raises:
            DataError: if rows are longer than the model's configuration allows.
            ModelError: if the model gives no logits of each position.
        """
        self._check(input_ids.shape[2])
        read = [self._logits(tokens) for tokens in input_ids.unbind(dim=1)]
        asked = continuation.unbind(dim=1)
        scores = torch.stack([_score(read[k % len(read)], tokens) for k, tokens in enumerate(asked)], dim=1)
        if lengths is not None:
            scores = scores / lengths
        return torch.where((continuation != NOT_COUNTED).any(dim=2), scores, -torch.inf)

    def _logits(self, tokens: Tensor) -> Tensor:
        found: Any = self.model.all_positions(tokens) if isinstance(self.model, GPT) else self.model(tokens)
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.dim() != 3:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ModelError(
                f"Choices takes a causal language model, which gives logits (rows, T, vocabulary) of tokens (rows, T); "
                f"{type(self.model).__name__} gives {given} for {tuple(tokens.shape)}"
            )
        return logits

    def _check(self, width: int) -> None:
        config = getattr(self.model, "config", None)
        config = getattr(config, "text_config", None) or config
        longest = next((most for name in _LENGTHS if (most := getattr(config, name, None)) is not None), None)
        if longest is not None and width > longest:
            raise DataError(
                f"a row of {width:,} tokens is longer than the {longest:,} that {type(self.model).__name__} reads; say "
                f"longest={longest} where the batches are made, which then leaves out the beginning of such rows"
            )


def _score(logits: Tensor, follows: Tensor) -> Tensor:
    """Sums of log p of those that follow, where they count: float64 (N,) of (N, T, vocabulary) and (N, T)."""
    counted = follows != NOT_COUNTED
    chances = logits[counted].double().log_softmax(dim=-1)
    each = torch.zeros(follows.shape, dtype=torch.float64, device=logits.device)
    each[counted] = chances.gather(1, follows[counted][:, None])[:, 0]
    return each.sum(dim=1)
