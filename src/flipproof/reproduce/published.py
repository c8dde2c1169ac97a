"""Our numbers beside the published ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from flipproof.errors import ConfigError


def beside(ours: pd.DataFrame, published: pd.DataFrame, *, on: Sequence[str], value: str) -> pd.DataFrame:
    """One row for everything either of us measured: the columns `on`, then `value` (ours) and `published`.

    Rows that only the paper has keep an empty value, and the other way round: nothing is dropped.

    Args:
        ours: has the columns `on` and `value`, and any other, e.g. `value_low`.
        published: has the columns `on` and `value`.
        on: what names a row, e.g. network and rate.
        value: the number compared.

    Raises:
        ConfigError: if a table names a row twice or lacks a column.

    Example:
        >>> ours = pd.DataFrame({"net": ["a", "b"], "drop": [0.1, 0.2]})
        >>> paper = pd.DataFrame({"net": ["b", "c"], "drop": [0.25, 0.3]})
        >>> beside(ours, paper, on=["net"], value="drop").values.tolist()
        [['a', 0.1, nan], ['b', 0.2, 0.25], ['c', nan, 0.3]]
    """
    for name, table in (("ours", ours), ("published", published)):
        if missing := [column for column in (*on, value) if column not in table]:
            raise ConfigError(f"{name} lacks the columns {missing}; it has {list(table.columns)}")
        if (twice := table.duplicated(subset=list(on))).any():
            raise ConfigError(f"{name} names a row twice: {table.loc[twice, list(on)].iloc[0].to_dict()}")
    theirs = published[[*on, value]].rename(columns={value: "published"})
    return ours.merge(theirs, on=list(on), how="outer", sort=False)


def write_table(table: pd.DataFrame, path: str | Path, *, title: str, digits: int = 4) -> None:
    """Write `path`.csv in full precision and `path`.md for people, rounded to `digits` significant digits.

    Args:
        table: what to write; empty values are shown as –.
        path: without suffix; its folder is made.
        title: heading of the Markdown page.
        digits: significant digits of the Markdown table.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"), index=False)
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        cells = [f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join("–" if cell in ("nan", "None", "<NA>") else cell for cell in cells) + " |")
    path.with_suffix(".md").write_text(f"# {title}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def slug(name: str) -> str:
    """A name as part of a file name.

    >>> slug("VGG-11 (width ¼)")
    'vgg-11-width'
    """
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
