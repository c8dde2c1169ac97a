"""Reports: pure functions of records."""

from flipproof.reports.figures import bit_figure, metric_figure, outcome_figure, save
from flipproof.reports.tables import compare, findings, summary_table

__all__ = ["bit_figure", "compare", "findings", "metric_figure", "outcome_figure", "save", "summary_table"]
