"""What a fault did to each sample: masked, non-critical SDC, critical SDC or DUE (Parchekani et al. 2024, III-A)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flipproof.errors import ConfigError, DataError
from flipproof.formats.base import bit_pattern

DecisionChoice = Literal["logits", "probabilities", "argmax"] | float | None
"""How outputs are to be read; None recognises it and warns where it cannot be told. See `Decision.from_golden`."""


@dataclass(frozen=True)
class Decision:
    """How this model's outputs become classes and scores, read once off its golden outputs.

    Attributes:
        outputs: whether they are "logits" or "probabilities" (all in [0, 1], and rows of several classes sum to 1).
        classes: number of classes; 2 for a single output.
        threshold: for a single output, class 1 is `output > threshold`: 0.5 for probabilities, 0 for logits, or what
            the user said. None for several outputs, where the largest wins (the first of equals).
        assumed: True if the outputs alone could be either, and nobody said which. It plays no part in comparisons.

    Example:
        >>> Decision.from_golden(torch.tensor([[2.0, -1.0], [0.5, 3.0]]))
        Decision(outputs='logits', classes=2, threshold=None)
        >>> Decision.from_golden(torch.tensor([0.2, 0.9])).classes_of(torch.tensor([0.6, float("nan")]))
        tensor([ 1, -1])
    """

    outputs: Literal["logits", "probabilities"]
    classes: int
    threshold: float | None
    assumed: bool = field(default=False, compare=False, repr=False)

    @classmethod
    def from_golden(cls, golden: Tensor, choice: DecisionChoice = None) -> Decision:
        """Read the convention off fault-free outputs of shape (N,), (N, 1) or (N, C).

        Args:
            golden: fault-free outputs.
            choice: "logits" or "probabilities" say what the outputs are; a number is the threshold of a single output
                (class 1 is `output > threshold`); "argmax" says that the largest of several wins. None takes outputs in
                [0, 1] (and, of several classes, rows that sum to 1) for probabilities, all others for logits.

        Raises:
            DataError: for any other shape, or a choice that these outputs contradict.
            ConfigError: for a choice of another kind.

        Example:
            >>> Decision.from_golden(torch.tensor([0.29, 0.31]), "logits").classes_of(torch.tensor([0.3, -0.3]))
            tensor([1, 0])
        """
        choice = check_choice(choice)
        if golden.dim() not in (1, 2) or golden.shape[-1] == 0:
            raise DataError(
                f"outputs must have the shape (samples,), (samples, 1) or (samples, classes), got "
                f"{tuple(golden.shape)}; pass output= a function that picks or reshapes them"
            )
        inside = bool(((golden >= 0) & (golden <= 1)).all())
        if choice == "probabilities" and not inside:
            low, high = (float(end) for end in torch.aminmax(golden.detach()))
            raise DataError(
                f"decision='probabilities', but the fault-free outputs reach from {low:.4g} to {high:.4g}; say "
                f"decision='logits', or output= a function that gives probabilities"
            )
        if golden.dim() == 1 or golden.shape[1] == 1:
            if choice == "argmax":
                raise DataError(
                    "decision='argmax' needs one output a class, and this model gives a single one: say 'logits', "
                    "'probabilities' or a threshold"
                )
            if isinstance(choice, float):
                return cls("probabilities" if inside and 0 < choice < 1 else "logits", 2, choice)
            if choice is not None:
                return cls("logits", 2, 0.0) if choice == "logits" else cls("probabilities", 2, 0.5)
            return cls("probabilities", 2, 0.5, assumed=True) if inside else cls("logits", 2, 0.0)
        if isinstance(choice, float):
            raise DataError(
                f"decision={choice:g} is a threshold for a single output, and this model gives {golden.shape[1]}; pass "
                f"output= a function that picks one, or leave decision= out"
            )
        if choice == "logits":
            return cls("logits", golden.shape[1], None)
        # half-precision softmax sums to 1 within about 1e-2; logits that pass this test in every row are a fluke
        total = golden.to(torch.float64).sum(dim=1)
        probabilities = inside and bool(((total - 1).abs() < 2e-2).all())
        if choice == "probabilities" and not probabilities:
            raise DataError(
                f"decision='probabilities', but rows of the fault-free outputs sum to {float(total.min()):.4g} … "
                f"{float(total.max()):.4g} instead of 1; say decision='logits' (or 'argmax')"
            )
        assumed = probabilities and choice is None
        return cls("probabilities" if probabilities else "logits", golden.shape[1], None, assumed=assumed)

    def settled(self, source: Source) -> Decision:
        """What an assumption comes to, once it is known what computed the outputs.

        A sigmoid or softmax settles that they are probabilities. What comes straight from a linear layer is a logit: of
        several classes, whose largest wins in either case, nothing stays assumed; of a single output its threshold.
        """
        if not self.assumed or source == "squashing":
            return replace(self, assumed=False)
        if source == "linear":
            several = self.threshold is None
            return replace(self, outputs="logits", threshold=None if several else 0.0, assumed=not several)
        return self

    @property
    def choice(self) -> DecisionChoice:
        """What `decision=` takes to mean the same.

        Example:
            >>> Decision("logits", 2, 0.3).choice, Decision("logits", 2, 0.0).choice
            (0.3, 'logits')
        """
        usual = {"logits": 0.0, "probabilities": 0.5}[self.outputs]
        return self.outputs if self.threshold in (None, usual) else self.threshold

    def describe(self) -> str:
        """How outputs become classes, in words.

        Example:
            >>> Decision("logits", 2, 0.0).describe()
            'logits, class 1 above 0'
        """
        if self.threshold is None:
            return f"{self.outputs}, the largest of {self.classes} wins"
        return f"{self.outputs}, class 1 above {self.threshold:g}"

    def classes_of(self, outputs: Tensor) -> Tensor:
        """The class of each sample, int64 (N,); −1 where the output holds a NaN."""
        if self.threshold is None:
            chosen = outputs.argmax(dim=1)
        else:
            chosen = (outputs.reshape(-1) > self.threshold).to(torch.int64)
        return torch.where(holds_nan(outputs), -1, chosen)

    def scores(self, outputs: Tensor) -> Tensor:
        """Scores for ranking metrics, float64: (N,) for one output, (N, C) class probabilities for several.

        Softmax is taken in float64 and in the limit: infinite logits share the whole probability. NaN rows stay NaN.
        """
        values = outputs.to(torch.float64)
        if self.threshold is not None:
            return values.reshape(-1)
        if self.outputs == "probabilities":
            return values
        top = values.amax(dim=1, keepdim=True)
        at_top = (values == top).to(torch.float64)
        limit = at_top / at_top.sum(dim=1, keepdim=True)
        return torch.where(torch.isinf(top), limit, torch.softmax(values, dim=1))


def check_choice(choice: object) -> DecisionChoice:
    """The choice if it is one; a whole number becomes a float.

    Raises:
        ConfigError: saying what `decision=` takes.
    """
    if choice is None or choice in ("logits", "probabilities", "argmax"):
        return choice
    if isinstance(choice, (int, float)) and not isinstance(choice, bool) and math.isfinite(choice):
        return float(choice)
    raise ConfigError(
        f"decision= takes None, 'logits', 'probabilities', 'argmax' or a number (the threshold of a single output), "
        f"got {choice!r}"
    )


Source = Literal["squashing", "linear", "other"]
"""What computed a tensor: a sigmoid or softmax, a linear layer or convolution, or anything else."""

_SQUASHING = ("sigmoid", "sigmoid_", "expit", "softmax", "hardsigmoid", "hardsigmoid_", "special_softmax")
_LINEAR = ("linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "einsum", "bilinear")
_HANDED_ON = (
    *("__getitem__", "squeeze", "unsqueeze", "reshape", "view", "flatten", "unflatten", "select", "narrow", "gather"),
    *("index_select", "masked_select", "transpose", "permute", "movedim", "t", "contiguous", "clone", "detach", "to"),
    *("float", "double", "half", "bfloat16", "cpu", "cuda", "cat", "concat", "stack", "take", "take_along_dim"),
    *("clamp", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_", "nan_to_num", "nan_to_num_", "where"),
)
"""Functions that move values, or cut them off, without computing others."""
_JOINING = ("cat", "concat", "stack")


class Sources(TorchFunctionMode):
    """Context that notes which tensors a sigmoid, a softmax or a linear layer gave, also when they are cut or reshaped.

    Example:
        >>> with Sources() as sources:
        ...     made = torch.sigmoid(torch.zeros(3, 1)).squeeze(1)
        >>> sources.of(made), sources.of(torch.zeros(3))
        ('squashing', 'other')
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Source]] = {}  # the tensor is kept: an id is given again once it is gone

    def of(self, tensor: Tensor) -> Source:
        """What computed a tensor."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None else "other"

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").partition(".")[0]
        if isinstance(result, Tensor):
            if name in _SQUASHING:
                self._known[id(result)] = (result, "squashing")
            elif name in _LINEAR or name.startswith("conv"):
                self._known[id(result)] = (result, "linear")
            elif name in _HANDED_ON:
                found = [self.of(leaf) for leaf in _tensors(args) if leaf.is_floating_point()]
                made: Source = next((source for source in found if source != "other"), "other")
                if name in _JOINING and len(set(found)) > 1:
                    made = "other"
                self._known[id(result)] = (result, made)
            else:
                self._known.pop(id(result), None)  # in place
        return result


def _tensors(args: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            leaves.append(arg)
        elif isinstance(arg, (list, tuple)):
            leaves += _tensors(arg)
    return leaves


def holds_nan(outputs: Tensor) -> Tensor:
    """Which samples have a NaN anywhere in their output, bool (N,)."""
    return torch.isnan(outputs).reshape(outputs.shape[0], -1).any(dim=1)


def classify(golden: Tensor, faulty: Tensor, decision: Decision) -> Tensor:
    """The outcome of each sample as an index into `OUTCOMES`, int64 (N,).

    Example:
        >>> from flipproof.running.scales import OUTCOMES
        >>> golden = torch.tensor([[1.0, 0.0]] * 4)
        >>> faulty = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 2.0], [1.0, float("nan")]])
        >>> [OUTCOMES[i] for i in classify(golden, faulty, Decision.from_golden(golden * 2))]
        ['masked', 'non_critical_sdc', 'critical_sdc', 'due']
    """
    same = (bit_pattern(golden) == bit_pattern(faulty)).reshape(golden.shape[0], -1).all(dim=1)
    same_class = decision.classes_of(golden) == decision.classes_of(faulty)
    outcome = torch.where(same, 0, torch.where(same_class, 1, 2))
    return torch.where(holds_nan(faulty), 3, outcome)
