"""Guard: closed-form bounds a channel, and the outputs bounded too. Not from a paper; see docs/hardening.md.

Every published method stops at the last activation. What comes after it, the layer that computes the class scores,
stays open: one high bit of one of its weights, and its class wins for every input. `GuardedLinear` closes it with one
bound a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof._hooks import hooked
from flipproof.errors import ConfigError
from flipproof.hardening.bounds.activations import take_hooks
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.hardening.fitting.profile import Per
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields
from flipproof.running.data import call, pick
from flipproof.running.evaluation import eval_mode


class GuardedLinear(nn.Linear):
    """A linear layer whose outputs beyond `threshold` (one a class), and NaN, are taken for faults and become `rest`.

    `weight` and `bias` keep their names, so the `state_dict` of the plain layer loads. Finite for every input: −∞
    becomes the lowest finite number. A fault in `threshold` or `rest` that makes them NaN counts as 0.

    Args:
        plain: the layer whose weights are taken over.
        threshold: largest output without faults, shape (out_features,).
        rest: the smallest output without faults, a scalar: a class score that cannot win.

    Example:
        >>> plain = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(plain.weight)
        >>> guarded = GuardedLinear(plain, torch.tensor([5.0, 5.0]), torch.tensor(-1.0))
        >>> guarded(torch.tensor([[4.0, 3.0], [9.0, 3.0], [float("nan"), 3.0]])).detach()
        tensor([[ 4.,  3.],
                [-1.,  3.],
                [-1., -1.]])
    """

    def __init__(self, plain: nn.Linear, threshold: Tensor, rest: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.threshold = nn.Parameter(threshold.detach().clone(), requires_grad=False)
        self.rest = nn.Parameter(rest.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Bounded outputs of `x`, shape (…, out_features)."""
        scores = super().forward(x)
        inside = scores <= torch.nan_to_num(self.threshold, 0.0)  # NaN is inside nothing
        scores = torch.where(inside, scores, torch.nan_to_num(self.rest, 0.0))
        return torch.nan_to_num(scores)


@dataclass(frozen=True)
class Guard(Hardening):
    """Zero whatever lies well beyond the largest value seen in its channel; take class scores beyond theirs for faults.

    A few passes over the calibration data, no training. How far beyond is what unseen inputs need: the
    largest values of 600 inputs are exceeded, in one or the other of 400 channels, by about every second input that
    follows. Why not the smallest threshold that keeps the accuracy, as ProAct has it: what a tighter bound cuts of a
    faulty value is little, since faults that matter exceed it by orders of magnitude, and what it cuts of the right
    values is lost at every rate.

    Args:
        per: a bound a "channel" (of a convolution; a neuron of a linear layer), a "neuron" or a "layer".
        replace: what becomes of a value outside: "zero", or the "bound" itself.
        outputs: guard the class scores too, where a linear layer with several outputs computes them. A score is taken
            for a fault if it lies further above the largest one seen of its class than the smallest of all lies below
            it: a right answer is worth more than the few faults between.
        slack: bounds lie at so many times the largest values seen. None finds the smallest of 1, 1.25, 1.5, 2, 3 … that
            hardly disturbs samples which the bounds have not seen.
        held_out: share of the calibration data that `harden` keeps to judge on.
        seed: of random parts of the calibration data.

    Example:
        >>> Guard()
        Guard(per='channel', replace='zero', outputs=True, slack=None, held_out=0.25, seed=0)
    """

    per: Per = "channel"
    replace: Literal["zero", "bound"] = "zero"
    outputs: bool = True
    slack: float | None = None
    held_out: float = HELD_OUT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in ("layer", "channel", "neuron") or self.replace not in ("bound", "zero"):
            raise ConfigError(
                f"Guard: per is 'layer', 'channel' or 'neuron', replace is 'bound' or 'zero', got {self!r}"
            )
        check_fields(self)

    def fit(self, work: Work) -> pd.DataFrame:
        work.place(ZeroAbove if self.replace == "zero" else Saturate, self.per, self.slack)
        if self.outputs:
            work.notes.append(guard_outputs(work))
        return pd.DataFrame()


def guard_outputs(work: Work) -> str:
    """Put a `GuardedLinear` in the place of the layer that computes the class scores; says what was done or why not."""
    name = scoring_layer(work)
    if name is None:
        return (
            "the outputs are not guarded: no linear layer that is called once gives what the model returns; a fault in "
            "the last layer's weights passes"
        )
    plain = work.model.get_submodule(name)
    assert isinstance(plain, nn.Linear)
    if plain.out_features < 2:
        return f"the outputs of {name} are not guarded: of a single score nobody can say what it should have been"
    scores = work.calibration.teacher.to(plain.weight.device)
    highest, lowest = scores.amax(dim=0), scores.amin()
    guarded = put_guard(work.model, name, highest + (highest - lowest), lowest)
    return f"the outputs of {name} are guarded by {guarded.threshold.numel() + 1} stored values"


def put_guard(model: nn.Module, name: str, threshold: Tensor, rest: Tensor) -> GuardedLinear:
    """Put a guard in the place of the linear layer of that name, over its weights and with its hooks."""
    plain = model.get_submodule(name)
    assert isinstance(plain, nn.Linear)
    guarded = GuardedLinear(plain, threshold, rest)
    take_hooks(guarded, plain)
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = guarded
    return guarded


def scoring_layer(work: Work) -> str | None:
    """The one `nn.Linear`, under one name and called once, whose output is what is judged."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in work.model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and name:
            places.setdefault(module, []).append(name)
    given: dict[str, list[Tensor]] = {}
    once = {names[0]: module for module, names in places.items()}
    with (
        eval_mode(work.model),
        hooked(once, lambda name, module, result: given.setdefault(name, []).append(result)),
    ):
        judged = pick(call(work.model, work.calibration.batches.inputs[0]), work.calibration.output)
    found = [name for name, results in given.items() if any(r is judged for r in results) and len(results) == 1]
    return found[0] if found and len(places[once[found[0]]]) == 1 else None
