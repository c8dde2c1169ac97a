"""What `assess` and its like are given, checked before anything is touched."""

from __future__ import annotations

import os
from numbers import Integral, Real
from typing import cast

from flipproof.errors import ConfigError


def check_numbers(
    *,
    trials: object,
    workers: object,
    seed: object,
    margin: object,
    confidence: object,
    cache_bytes: object,
    journal: object,
    audit: object,
    together: object = 1,
    verb: str = "assess",
) -> None:
    """Refuse counts that are no whole numbers, shares outside (0, 1), and a `journal=` that is no path.

    Raises:
        ConfigError: naming the argument, what it takes and what came.
    """
    counts = {"trials": trials, "workers": workers, "seed": seed}
    for name, value in (counts if cache_bytes is None else counts | {"cache_bytes": cache_bytes}).items():
        if not _is(value, Integral):
            raise ConfigError(f"{verb} takes a whole number for {name}=, got {value!r}")
    shares = {"confidence": confidence} if margin is None else {"confidence": confidence, "margin": margin}
    for name, value in shares.items():
        if not _is(value, Real):
            raise ConfigError(f"{verb} takes a number between 0 and 1 for {name}=, got {value!r}")
    least = {"trials": 1, "workers": 1, "seed": 0}
    enough = all(cast(int, value) >= least[name] for name, value in counts.items())
    if not enough or not all(0 < cast(float, value) < 1 for value in shares.values()):
        raise ConfigError(
            f"{verb} needs workers ≥ 1, trials ≥ 1, seed ≥ 0, confidence and margin in (0, 1), got workers={workers}, "
            f"trials={trials}, seed={seed}, confidence={confidence}, margin={margin}"
        )
    if cache_bytes is not None and cast(int, cache_bytes) < 0:
        raise ConfigError(f"{verb} takes 0 (no cache) or more bytes for cache_bytes=, got {cache_bytes}")
    if not _is(audit, Real) or not 0 <= cast(float, audit) <= 1:
        raise ConfigError(f"{verb} takes a share of the trials from 0 to 1 for audit=, got {audit!r}")
    if not _is(together, Integral) or cast(int, together) < 1:
        raise ConfigError(f"{verb} takes a whole number of trials a forward, from 1, for together=, got {together!r}")
    if cast(int, together) > 1 and workers != 1:
        raise ConfigError(
            f"together={together} shares forwards within one process, and workers={workers} are several: give one of "
            f"the two"
        )
    if journal is not None and not isinstance(journal, (str, os.PathLike)):
        raise ConfigError(f"{verb} takes the path of a journal for journal=, got {journal!r}")


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
