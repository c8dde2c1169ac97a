"""Reports: pure functions of records."""

from flipproof.reports.bits import profile_figure
from flipproof.reports.bounds import distribution_figure, history_figure
from flipproof.reports.figures import bit_figure, metric_figure, outcome_figure, save
from flipproof.reports.html import report
from flipproof.reports.tables import compare, findings, summary_table
from flipproof.reports.tradeoff import tradeoff_figure

__all__ = [
    "bit_figure",
    "compare",
    "distribution_figure",
    "findings",
    "history_figure",
    "metric_figure",
    "outcome_figure",
    "profile_figure",
    "report",
    "save",
    "summary_table",
    "tradeoff_figure",
]
