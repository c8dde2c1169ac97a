"""What was found out about a model where it is deployed: a record, read without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import pandas as pd

from flipproof._fields import Fields

Result = Literal["bit-equal", "within rounding", "beyond rounding", "refused", "not installed"]


@dataclass(frozen=True)
class Way:
    """One way in which a model is run, held against the model as it is.

    Attributes:
        name: "batch 1 against N", "torch.export" or "onnxruntime".
        result: "bit-equal", "within rounding" or "beyond rounding"; "refused" if it could not be run this way, "not
            installed" if what runs it is not there.
        difference: the largest |output − output|; None where nothing was run.
        room: the largest that is put down to rounding, see `check_deployment`; None where nothing was run.
        changed: samples whose decision is another one, by the task (a critical SDC, if it were by a fault); None where
            nothing was run, or nothing says what outputs are for.
        reason: why it was refused; "" otherwise.
        seconds: it took.
    """

    name: str
    result: Result
    difference: float | None = None
    room: float | None = None
    changed: int | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Deployment:
    """What `check_deployment` found.

    Attributes:
        ways: of running the model.
        samples: that were run each way.

    Example:
        >>> found = Deployment((Way("torch.export", "within rounding", 1e-7, 1e-4, 0),), samples=8)
        >>> print(found)
        Without faults, on 8 samples:
          torch.export: within rounding, differs by up to 1e-07 (room 0.0001); 0 decisions change
        >>> found.agrees, Deployment.from_json(Fields(found.to_json(), "a file")) == found
        (True, True)
    """

    ways: tuple[Way, ...]
    samples: int

    @property
    def agrees(self) -> bool:
        """Whether no way that was run differs by more than rounding, or decides otherwise."""
        return not any(way.result == "beyond rounding" or way.changed for way in self.ways)

    def table(self) -> pd.DataFrame:
        """One row a way, a column an attribute of `Way`."""
        return pd.DataFrame([asdict(way) for way in self.ways])

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"ways": [asdict(way) for way in self.ways], "samples": self.samples}

    @classmethod
    def from_json(cls, fields: Fields) -> Deployment:
        """The inverse of `to_json`, for what a file holds.

        Raises:
            ConfigError: naming a field that is not as it is written.
        """
        found = cls(fields.each("ways", _way), fields.whole("samples"))
        fields.end()
        return found

    def __str__(self) -> str:
        lines = [f"Without faults, on {self.samples} samples:"]
        for way in self.ways:
            text = f"  {way.name}: {way.result}"
            if way.result in ("within rounding", "beyond rounding"):
                text += f", differs by up to {way.difference:.3g} (room {way.room:.3g})"
            if way.changed is not None and way.result != "bit-equal":
                text += f"; {way.changed} decision{'' if way.changed == 1 else 's'} change"
            lines.append(text + (f": {way.reason}" if way.reason else ""))
        return "\n".join(lines)


def _way(fields: Fields) -> Way:
    """One way, as a file says it."""

    def number(name: str) -> float | None:
        return None if fields.take(name) is None else fields.number(name)

    result: Any = fields.text("result", among=get_args(Result))
    return Way(
        name=fields.text("name"),
        result=result,
        difference=number("difference"),
        room=number("room"),
        changed=None if fields.take("changed") is None else fields.whole("changed"),
        reason=fields.text("reason"),
        seconds=fields.number("seconds"),
    )
