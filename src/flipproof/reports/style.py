"""What figures and pages have in common: colours, names of outcomes and of sweeps."""

from __future__ import annotations

from flipproof.campaigns.assessment import Assessment
from flipproof.errors import ConfigError

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OUTCOME_STYLE = {
    "masked": ("masked", "#DDDDDD", ""),
    "non_critical_sdc": ("non-critical SDC", "#56B4E9", ""),
    "critical_sdc": ("critical SDC", "#E69F00", "//"),
    "due": ("DUE", "#882255", "xx"),
}
SWEEPS = {"ber": "bit error rate (flips per stored bit)", "count": "flipped bits", "bit": "bit position"}


def sweep_of(assessment: Assessment) -> str:
    """The column that names the points of a campaign: "ber", "bit", "count" …; refuses one without trials."""
    if assessment.summary.empty:
        raise ConfigError("the campaign has no trial yet; there is nothing to draw")
    return str(next(iter(assessment.header.points[0].coordinates)))
