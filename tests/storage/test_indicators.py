import re
from pathlib import Path

import pytest

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.reproduce.fortune_published import BERS, ROWS, WEIGHTS, table_1, table_2

PAPER = Path(__file__).resolve().parents[3] / "shared" / "papers" / "fortune.txt"
WIDTH = {"8-bit": 8, "P-5-bit": 7, "P-4-bit": 6, "P-3-bit": 5}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_p_drop_is_the_published_column_with_the_drop_at_the_highest_rate(row):
    network, type_, memory, _, drops, published = row
    for ber, value in zip(BERS, published, strict=True):
        found = fp.p_drop(parameters=memory, width=1, ber=ber, accuracy_drop=drops[-1])
        # printed with two digits at 1e-5, cut or rounded, and small rows multiplied from there
        assert 1e3 * found == pytest.approx(value, rel=1e-3, abs=0.01 * ber / 1e-5), (network, type_, ber)


def test_memory_is_weights_times_width_except_where_the_paper_counts_layers_twice():
    for network, type_, memory, *_ in ROWS:
        ours = WEIGHTS[network] * WIDTH[type_]
        if (network, type_) == ("Inception", "8-bit"):
            assert ours != memory  # its own other rows say 21,604,928 weights
        elif (network, type_) == ("Inception", "P-4-bit"):
            assert ours == pytest.approx(memory, rel=2e-3)
        else:
            assert ours == memory


def test_closed_forms():
    assert fp.p_drop(parameters=10, width=2, ber=0.5, accuracy_drop=3.0, upset_rate=0.1) == pytest.approx(60.0)
    assert fp.rap(accuracy_drop=2.0, memory=0.5, time=3.0) == 3.0
    assert fp.p_drop(parameters=0, width=8, ber=1e-3, accuracy_drop=5) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: fp.p_drop(parameters=-1, width=8, ber=1e-3, accuracy_drop=1),
        lambda: fp.p_drop(parameters=1, width=0, ber=1e-3, accuracy_drop=1),
        lambda: fp.p_drop(parameters=1, width=8, ber=-1e-3, accuracy_drop=1),
        lambda: fp.p_drop(parameters=1, width=8, ber=1e-3, accuracy_drop=float("nan")),
        lambda: fp.rap(accuracy_drop=1, memory=0, time=1),
        lambda: fp.rap(accuracy_drop=1, memory=1, time=float("inf")),
    ],
)
def test_refuses_nonsense(call):
    with pytest.raises(ConfigError, match="takes"):
        call()


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's text beside the repository")
def test_published_numbers_are_those_of_the_text():
    text = PAPER.read_text()
    for _, type_, memory, time, drops, published in ROWS:
        line = next(line for line in text.splitlines() if f"{memory:,}" in line)
        assert type_ in line
        assert f"{100 * time:.2f}".rstrip("0").rstrip(".") in line
        assert all(f"{value:.2f}" in line for value in (*drops, *published))
    for value in table_1()["accuracy"]:
        assert f"{100 * value:.2f}" in text
    assert len(table_2()) == 60
    assert len(re.findall(r"P-\d-bit", text)) == 11
