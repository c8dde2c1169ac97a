"""What a hardening method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from flipproof.errors import ConfigError
from flipproof.hardening.fitting.work import Work

HELD_OUT = 0.25
"""Share of the calibration samples that nothing is fitted to: acceptance is judged on them."""


@dataclass(frozen=True)
class Hardening(ABC):
    """A way to choose bounds. Frozen; its `repr` rebuilds it and is kept in records.

    A new one is a frozen dataclass with `fit`; `harden` finds the activations, profiles them, checks what came out
    and writes the report. Fields of the name `held_out` (the share of the samples that `harden` keeps to judge on) and
    `seed` (of the draw of that part) take the place of the defaults.
    """

    held_out = HELD_OUT
    seed = 0

    open_recurrent: ClassVar[bool] = False
    """True if LSTM, GRU and RNN layers are to be opened, so that each of their gates is a site."""

    @abstractmethod
    def fit(self, work: Work) -> pd.DataFrame:
        """Put a bound at every site of `work`; returns the history of the search, a row a step."""


def check_fields(method: Hardening) -> None:
    """Check the fields that most methods share.

    Raises:
        ConfigError: if `slack` is below 1, `held_out` not in (0, 1) or `seed` negative.
    """
    slack = getattr(method, "slack", None)
    if slack is not None and not 1 <= slack < float("inf"):
        raise ConfigError(f"{type(method).__name__}: slack is None or at least 1, got {method!r}")
    if not 0 < method.held_out < 1 or method.seed < 0:
        raise ConfigError(f"{type(method).__name__}: held_out lies in (0, 1) and seed is not negative, got {method!r}")
