"""StageNet (Gao et al. 2020), the stage-aware LSTM that Parchekani et al. 2024 inject faults into."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StageNet(nn.Module):
    """An LSTM whose state is split into levels that forget at their own pace, and a convolution over its last steps.

    With H = `hidden`, L = `levels`, C = H / L, at every step t::

        a = W_k [x; Δ] + b_k + W_r [h; Δ] + b_r                       (4H + 2L)
        f̃ = cumsum(softmax(a[:L])),  ĩ = flip(cumsum(softmax(flip(a[L:2L]))))
        f, i, o = σ(·), g = tanh(·)  of the rest, each L × C
        ω = f̃ · ĩ;  c ← ω (f c + i g) + (f̃ − ω) c + (ĩ − ω) g;  h = o · tanh(c)
        d = 1 − mean(f̃)

    With a convolution, the last K of h and d (zeros before the first step) give Z = h · softmax(cumsum(d)), the theme
    u = σ(W₂ relu(W₁ mean_K Z)), and y = u ⊙ Conv1d(Z); the risk is σ(W_o · (y + h)), without it σ(W_o · h). The
    recurrence runs step by step; everything after it is computed for all steps at once.

    Args:
        hidden: H.
        levels: L, divides H.
        kernel: K, width of the convolution; None leaves the convolution module out.
        bottleneck: B, width of the theme's inner layer.
        input_size: features of x, without Δ.
        num_classes: risks a step.
        dropout: on h and on y + h, while training.

    Raises:
        ValueError: if L does not divide H.
    """

    def __init__(
        self,
        hidden: int,
        levels: int,
        kernel: int | None,
        bottleneck: int,
        *,
        input_size: int = 93,
        num_classes: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if hidden % levels:
            raise ValueError(f"StageNet splits its state into levels of one size: {hidden} / {levels} is not whole")
        self.hidden, self.levels, self.kernel_size = hidden, levels, kernel
        self.kernel = nn.Linear(input_size + 1, 4 * hidden + 2 * levels)
        self.recurrent = nn.Linear(hidden + 1, 4 * hidden + 2 * levels)
        nn.init.xavier_uniform_(self.kernel.weight)
        nn.init.orthogonal_(self.recurrent.weight)
        nn.init.zeros_(self.kernel.bias)
        nn.init.zeros_(self.recurrent.bias)
        self.forget_gate, self.input_gate, self.output_gate = nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()
        self.candidate, self.cell = nn.Tanh(), nn.Tanh()
        self.conv: nn.Conv1d | None = None
        if kernel is not None:
            self.conv = nn.Conv1d(hidden, hidden, kernel)
            self.theme1, self.theme2 = nn.Linear(hidden, bottleneck), nn.Linear(bottleneck, hidden)
            self.theme_relu, self.theme_gate = nn.ReLU(), nn.Sigmoid()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, num_classes)
        self.risk = nn.Sigmoid()

    def forward(
        self, x: Tensor, delta: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Risk at every step.

        Args:
            x: features (N, T, input_size).
            delta: time since the step before (N, T); 1 if not given.
            mask: 1 where a step exists (N, T), for sequences of several lengths padded at their end. The recurrence
                never looks ahead, so padding cannot change a real step; risks at padded steps are 0.
            at: bool (N, T), the steps to answer for.

        Returns:
            Probabilities (N, T), or (number of `at`,), row by row; with several classes one more dimension, last.

        Raises:
            ValueError: if a mask leaves out a step before one that exists.
        """
        states, distances = self._recurrence(x, torch.ones_like(x[..., 0]) if delta is None else delta)
        rest = self.dropout(states) if self.conv is not None else states
        if self.conv is not None:
            rest = rest + self._theme_and_pattern(states, distances)
        risk: Tensor = self.risk(self.output(self.dropout(rest)))
        if mask is not None:
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise ValueError("StageNet takes sequences padded at their end; this mask has gaps before real steps")
            risk = torch.where(mask[..., None] > 0, risk, torch.zeros_like(risk))
        if risk.shape[-1] == 1:
            risk = risk.squeeze(-1)
        return risk if at is None else risk[at]

    def _recurrence(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """States h (N, T, H) and stage distances d (N, T)."""
        count, levels = x.shape[0], self.levels
        delta = delta.to(x.dtype).unsqueeze(-1)
        driven = self.kernel(torch.cat([x, delta], dim=-1))
        h = x.new_zeros(count, self.hidden)
        c = x.new_zeros(count, levels, self.hidden // levels)
        states, distances = [], []
        for t in range(x.shape[1]):
            a = driven[:, t] + self.recurrent(torch.cat([h, delta[:, t]], dim=-1))
            forget = a[:, :levels].softmax(dim=-1).cumsum(dim=-1).unsqueeze(-1)
            take = a[:, levels : 2 * levels].flip(-1).softmax(dim=-1).cumsum(dim=-1).flip(-1).unsqueeze(-1)
            f, i, o, g = a[:, 2 * levels :].reshape(count, 4, *c.shape[1:]).unbind(dim=1)
            f, i, o, g = self.forget_gate(f), self.input_gate(i), self.output_gate(o), self.candidate(g)
            both = forget * take
            c = both * (f * c + i * g) + (forget - both) * c + (take - both) * g
            h = (o * self.cell(c)).reshape(count, self.hidden)
            states.append(h)
            distances.append(1 - forget.mean(dim=(1, 2)))
        return torch.stack(states, dim=1), torch.stack(distances, dim=1)

    def _theme_and_pattern(self, states: Tensor, distances: Tensor) -> Tensor:
        """Progression y of every step (N, T, H), from a window of the last K steps."""
        assert self.conv is not None
        assert self.kernel_size is not None
        count, steps, _ = states.shape
        before = self.kernel_size - 1
        windows = F.pad(states, (0, 0, before, 0)).unfold(1, self.kernel_size, 1)  # (N, T, H, K)
        weights = F.pad(distances, (before, 0)).unfold(1, self.kernel_size, 1).cumsum(dim=-1).softmax(dim=-1)
        weighted = windows * weights.unsqueeze(2)
        theme = self.theme_gate(self.theme2(self.theme_relu(self.theme1(weighted.mean(dim=-1)))))
        pattern = self.conv(weighted.reshape(count * steps, self.hidden, self.kernel_size))
        progression: Tensor = theme * pattern.reshape(count, steps, self.hidden)
        return progression

    def weight_counts(self) -> dict[str, int]:
        """Weights, without biases, as Table I counts them: {"lstm", "conv", "fc"}.

        Example:
            >>> stage_conv_72().weight_counts()
            {'lstm': 48764, 'conv': 51840, 'fc': 1800}
        """
        lstm = self.kernel.weight.numel() + self.recurrent.weight.numel()
        conv = self.conv.weight.numel() if self.conv is not None else 0
        total = sum(p.numel() for name, p in self.named_parameters() if name.endswith("weight"))
        return {"lstm": lstm, "conv": conv, "fc": total - lstm - conv}


def stage_conv_384(num_classes: int = 1, *, input_size: int = 93) -> StageNet:
    """Stage-CONV-384 of Table I: 738,618 + 442,368 + 24,960 weights."""
    return StageNet(384, 3, 3, 32, input_size=input_size, num_classes=num_classes)


def stage_conv_72(num_classes: int = 1, *, input_size: int = 93) -> StageNet:
    """Stage-CONV-72 of Table I: 48,764 + 51,840 + 1,800 weights."""
    return StageNet(72, 2, 10, 12, input_size=input_size, num_classes=num_classes)


def stage_384(num_classes: int = 1, *, input_size: int = 93) -> StageNet:
    """Stage-384 of Table I, without the convolution: 738,618 + 384 weights."""
    return StageNet(384, 3, None, 32, input_size=input_size, num_classes=num_classes)


def stage_72(num_classes: int = 1, *, input_size: int = 93) -> StageNet:
    """Stage-72 of Table I, without the convolution: 48,764 + 72 weights."""
    return StageNet(72, 2, None, 12, input_size=input_size, num_classes=num_classes)
