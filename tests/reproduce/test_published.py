from __future__ import annotations

import pandas as pd
import pytest

from flipproof.errors import ConfigError
from flipproof.reproduce import beside, write_table


def test_a_table_that_names_a_row_twice_or_lacks_a_column_is_refused():
    good = pd.DataFrame({"net": ["a"], "drop": [0.1]})
    with pytest.raises(ConfigError, match=r"published names a row twice: \{'net': 'a'\}"):
        beside(good, pd.concat([good, good]), on=["net"], value="drop")
    with pytest.raises(ConfigError, match=r"ours lacks the columns \['rap'\]"):
        beside(good, good, on=["net"], value="rap")


def test_written_tables_keep_full_precision_and_show_gaps(tmp_path):
    table = pd.DataFrame({"net": ["a", "b"], "drop": [0.123456789, float("nan")]})
    write_table(table, tmp_path / "folder" / "table", title="Drops", digits=3)
    back = pd.read_csv(tmp_path / "folder" / "table.csv")
    pd.testing.assert_frame_equal(back, table)
    assert (tmp_path / "folder" / "table.md").read_text() == (
        "# Drops\n\n| net | drop |\n|---|---|\n| a | 0.123 |\n| b | – |\n"
    )
