"""Greedy generation by a causal language model, with its cache of keys and values kept where faults can hit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, ModelError
from flipproof.models.gpt import GPT
from flipproof.models.key_values import KeyValues


class Greedy(nn.Module):
    """A language model that writes on: always the most likely token, `length` of them.

    The prompt is read in one go (prefill); then each token is read by itself, beside the keys and values of all before
    it (decode). Between two tokens these lie in `memory`, where `fp.Cache()` hits them.

    Args:
        model: a `flipproof.models.small_gpt`, or a causal language model of Hugging Face, which returns ``logits`` and
            its cache if it is asked to.
        length: tokens that are written, 1 at the least.

    Raises:
        ConfigError: if `length` is less than 1.

    Example:
        >>> from flipproof.models import small_gpt
        >>> writer = Greedy(small_gpt(vocabulary=65), length=3).eval()
        >>> logits = writer(torch.zeros(2, 8, dtype=torch.long))
        >>> logits.shape, logits.argmax(dim=2).shape  # the second is what is written
        (torch.Size([2, 3, 65]), torch.Size([2, 3]))
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ConfigError(f"Greedy writes length= 1 token or more, got {length!r}")
        self.model, self.length = model, length
        self.memory = KeyValues()

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 prompts (N, T), all of one length, to logits (N, length, vocabulary) of each token that is written."""
        written: list[Tensor] = []
        given, cache = tokens, None
        for step in range(self.length):
            logits, cache, pairs = self._read(given, cache)
            written.append(logits)
            given = logits.argmax(dim=-1, keepdim=True)
            if step + 1 < self.length:
                self.memory(pairs)
        return torch.stack(written, dim=1)

    def _read(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any, list[tuple[Tensor, Tensor]]]:
        """Logits behind the last token, the cache, and the keys and values in it, layer by layer."""
        if isinstance(self.model, GPT):
            held = [[] for _ in self.model.blocks] if cache is None else cache
            logits = self.model.read_on(tokens, held)
            return logits, held, [(keys, values) for keys, values in held]
        name, kept = cache if cache is not None else ("", None)
        found = self.model(input_ids=tokens, use_cache=True, **({name: kept} if name else {}))
        name = name or next((key for key in ("cache", "past_key_values") if getattr(found, key, None) is not None), "")
        kept = getattr(found, name, None) if name else None
        layers = getattr(kept, "layers", None)
        if not layers or not all(isinstance(getattr(one, "keys", None), Tensor) for one in layers):
            raise ModelError(
                f"Greedy takes a causal language model that gives a cache of keys and values for each layer when it is "
                f"called with use_cache=True; {type(self.model).__name__} gives {type(kept).__name__}"
            )
        return found.logits[:, -1], (name, kept), [(one.keys, one.values) for one in layers]
