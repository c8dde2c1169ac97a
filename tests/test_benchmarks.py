"""The benchmarks run, on tiny networks; how fast is for `make bench` to say."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.__main__ import BENCHMARKS, README, with_results
from benchmarks.measure import Row, Size, interleaved


# random weights answer at random: whether bounds cost one of 64 such answers is up to a processor's rounding
@pytest.mark.filterwarnings("ignore:.* costs accuracy:flipproof.errors.FlipproofWarning")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_at_a_tiny_size(name):
    rows = BENCHMARKS[name].run(Size.SMOKE)
    assert rows
    for row in rows:
        assert row.note if row.ratio is None else math.isfinite(row.ratio), row
        assert row.measured in with_results(README.read_text(encoding="utf-8"), name, rows, "here")


def test_results_replace_only_their_own_block():
    text = "a <!-- x --> old <!-- /x --> b <!-- y --> kept <!-- /y -->"
    rows = [Row("cost", 0.031, at_most=0.02, percent=True), Row("gain", 5.5, at_least=5), Row("none", None, note="why")]
    found = with_results(text, "x", rows, "a machine")
    assert found.startswith("a <!-- x -->")
    assert found.endswith("<!-- /x --> b <!-- y --> kept <!-- /y -->")
    assert "old" not in found
    assert "| cost | ≤ 2 % | 3.1 % | **no** |" in found
    assert "| gain | ≥ 5 × | 5.5 × | yes |" in found
    assert "| none |  | skipped (why) |  |" in found
    assert with_results(found, "x", rows, "a machine") == found
    with pytest.raises(ValueError, match="markers"):
        with_results(text, "z", rows, "a machine")


def test_medians_leave_out_the_first_round():
    values = {"a": iter([100.0, 1.0, 3.0, 2.0]), "b": iter([0.0, 5.0, 5.0, 5.0])}
    assert interleaved({name: lambda turn, name=name: next(values[name]) for name in values}, 3) == {"a": 2.0, "b": 5.0}
