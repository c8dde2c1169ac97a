"""Where the command line writes: results to standard output, everything else to standard error."""

from __future__ import annotations

import sys

from rich.console import Console

PLAIN_WIDTH = 100
"""Columns of output that goes to a file or a pipe."""

out = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH)
