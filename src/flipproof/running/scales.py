"""What the numbers of a record mean: the outcomes of samples, and unit, range and direction of metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from math import inf, isfinite, isinf, isnan, nan
from typing import Any

from flipproof._fields import Fields, wrong


class Outcome(StrEnum):
    """The four classes; every sample of every trial is in exactly one."""

    MASKED = "masked"
    """The output is identical to the golden run's, bit by bit."""
    NON_CRITICAL_SDC = "non_critical_sdc"
    """The output differs (even by the sign of a zero) but names the same class."""
    CRITICAL_SDC = "critical_sdc"
    """The output names another class."""
    DUE = "due"
    """Detected unrecoverable error: the output holds a NaN, or the faulty model raised."""


OUTCOMES = tuple(outcome.value for outcome in Outcome)


@dataclass(frozen=True)
class Scale:
    """What the numbers of a metric mean.

    Attributes:
        unit: "%" for shares (0.5 is shown as 50.0), else what is written behind a number, "" for none.
        range: lowest and highest possible value; infinite where there is none.
        higher_is_better: None if nobody said.
        per_sample: True if it is the share of correct answers, for which intervals over samples are made.
    """

    unit: str = ""
    range: tuple[float, float] = (-inf, inf)
    higher_is_better: bool | None = None
    per_sample: bool = False

    @property
    def worst(self) -> float:
        """The worst possible value; nan if there is none or the direction is not known."""
        if self.higher_is_better is None:
            return nan
        end = self.range[0] if self.higher_is_better else self.range[1]
        return end if isfinite(end) else nan

    def text(self, value: float) -> str:
        """A value as people write it, without its unit; "∞" for infinity, "–" for NaN, never −0.

        Example:
            >>> Scale("%").text(0.1234), Scale().text(11.334), Scale().text(float("inf"))
            ('12.3', '11.33', '∞')
        """
        if isnan(value):
            return "–"
        if isinf(value):
            return "∞" if value > 0 else "−∞"
        if self.unit == "%":
            shown = f"{100 * value:.1f}"
        else:
            shown = f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
        return shown[1:] if shown.startswith("-") and not shown.strip("-0.") else shown

    def with_unit(self, value: float) -> str:
        """A value and its unit, in a sentence.

        Example:
            >>> Scale("%").with_unit(0.1234), Scale("m").with_unit(2.5)
            ('12.3%', '2.5 m')
        """
        return f"{self.text(value)}{self.unit if self.unit == '%' else ' ' * bool(self.unit) + self.unit}"

    @property
    def step(self) -> str:
        """The unit of a difference: "points" for shares, with a blank before it; "" for none."""
        return " points" if self.unit == "%" else f" {self.unit}" if self.unit else ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; an infinite end is null."""
        ends = [end if isfinite(end) else None for end in self.range]
        return {**asdict(self), "range": ends}

    @classmethod
    def from_json(cls, found: Any, place: str) -> Scale:
        """The inverse of `to_json`.

        Raises:
            ConfigError: naming the place, what was expected and what came.
        """
        about = Fields(found, place)
        ends = about.take("range")
        if not isinstance(ends, list) or len(ends) != 2:
            raise wrong(about.at("range"), "two numbers or null", ends)
        low, high = (no_end if end is None else end for end, no_end in zip(ends, (-inf, inf), strict=True))
        limits = Fields({"low": low, "high": high}, about.at("range"))
        better = None if about.take("higher_is_better") is None else about.flag("higher_is_better")
        numbers = (limits.number("low"), limits.number("high"))
        return cls(about.text("unit"), numbers, better, about.flag("per_sample"))


SHARE = Scale("%", (0.0, 1.0), True)
LOSS = Scale("%", (0.0, 1.0), False)


_RIGHT = Scale("%", (0.0, 1.0), True, per_sample=True)

METRICS = {
    "accuracy": _RIGHT,
    "auroc": SHARE,
    "average_precision": SHARE,
    "exact_match": _RIGHT,
    "label_accuracy": SHARE,
    "within_tolerance": _RIGHT,
    "mean_absolute_error": Scale("", (0.0, inf), False),
    "root_mean_square_error": Scale("", (0.0, inf), False),
    "r2": Scale("", (-inf, 1.0), True),
    "image_miou": SHARE,
    "miou": SHARE,
    "pixel_accuracy": SHARE,
    "f1": SHARE,
    "misses": LOSS,
    "ghosts": Scale("an image", (0.0, inf), False),
    "mean_average_precision": SHARE,
    "token_accuracy": SHARE,
    "perplexity": Scale("", (1.0, inf), False),
    "score": SHARE,
    "cosine": Scale("", (-1.0, 1.0), True),
    "recall_at_1": SHARE,
    "unchanged": _RIGHT,
}
"""Metrics that are known by name; each task says which it has. `per_sample` ones are the share of right answers."""


def scale_of(name: str) -> Scale:
    """What a column of a campaign means of which the journal says nothing: built-ins and outcomes are shares.

    Example:
        >>> scale_of("accuracy").unit, scale_of("delay").unit, scale_of("due").higher_is_better
        ('%', '', False)
    """
    if name in METRICS:
        return METRICS[name]
    if name in (*OUTCOMES, "critical_total"):
        return SHARE if name == "masked" else LOSS
    return Scale()
