"""FORTUNE's indicators: probability of a drop over a device's life, and drop × memory × time."""

from __future__ import annotations

from math import isfinite

from flipproof.errors import ConfigError

UPSET_RATE = 1.33e-15
"""T/t · P_single of Eq. 6: the product that the published column follows."""


def p_drop(*, parameters: int, width: int, ber: float, accuracy_drop: float, upset_rate: float = UPSET_RATE) -> float:
    """Probability of experiencing an accuracy drop over the device's life (Nazari et al. 2024, Eq. 6).

    P_drop = (N · W)² · BER · accuracy_drop · upset_rate

    Eq. 6 as printed takes the drop measured at that BER. The published column takes, in every row and at every BER, the
    drop at the *highest* BER of the sweep: give that one to get Table II.

    Args:
        parameters: N, stored values.
        width: W, stored bits a value.
        ber: bit error rate.
        accuracy_drop: in percent.
        upset_rate: T/t · P_single.

    Returns:
        The indicator. It is no probability in the strict sense: nothing keeps it below 1.

    Raises:
        ConfigError: on a negative count, or numbers that are not finite.

    Example:
        >>> round(p_drop(parameters=28_133_056, width=8, ber=1e-5, accuracy_drop=74.52), 5)  # VGG-11, 8 bits
        0.0502
    """
    if parameters < 0 or width < 1 or not all(map(isfinite, (ber, accuracy_drop, upset_rate))) or ber < 0:
        raise ConfigError(
            f"p_drop takes parameters ≥ 0, width ≥ 1, ber ≥ 0 and finite numbers, got parameters={parameters}, "
            f"width={width}, ber={ber}, accuracy_drop={accuracy_drop}, upset_rate={upset_rate}"
        )
    return float(parameters * width) ** 2 * ber * accuracy_drop * upset_rate


def rap(*, accuracy_drop: float, memory: float, time: float) -> float:
    """Reliability-aware performance, smaller is better (Nazari et al. 2024, Eq. 7).

    RAP = accuracy_drop · memory · time

    Args:
        accuracy_drop: in percent, or in whatever unit the others of a comparison have.
        memory: relative to a baseline, e.g. 0.625 for 5 bits instead of 8.
        time: relative to the same baseline.

    Raises:
        ConfigError: if memory or time is not positive, or a number is not finite.

    Example:
        >>> rap(accuracy_drop=10.0, memory=0.625, time=1.0)
        6.25
    """
    if not all(map(isfinite, (accuracy_drop, memory, time))) or memory <= 0 or time <= 0:
        raise ConfigError(
            f"rap takes memory > 0, time > 0 and finite numbers, got accuracy_drop={accuracy_drop}, memory={memory}, "
            f"time={time}"
        )
    return accuracy_drop * memory * time
