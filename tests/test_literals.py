from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.faults import parse_faults
from flipproof.formats import parse_format

FORMATS = st.one_of(
    st.sampled_from([fp.Float32(), fp.Float16(), fp.BFloat16(), fp.Float8E4M3(), fp.Float8E5M2()]),
    st.builds(fp.Affine, bits=st.integers(2, 8), axis=st.sampled_from([None, 0])),
    st.builds(fp.FixedPoint, integer_bits=st.integers(1, 15), fraction_bits=st.integers(0, 16)),
)
RATES = st.lists(st.floats(1e-9, 1), min_size=1, max_size=4, unique=True)
FAULTS = st.one_of(
    st.builds(fp.BitErrorRate, RATES, exact=st.booleans()),
    st.builds(fp.BitPosition, st.lists(st.integers(0, 31), min_size=1, unique=True)),
    st.builds(fp.RandomBits, st.integers(1, 100)),
    st.builds(fp.StuckAt, RATES, value=st.integers(0, 1)),
)


@given(FORMATS)
def test_every_format_is_read_back_from_its_repr(format):
    assert parse_format(repr(format)) == format


@given(FAULTS)
def test_every_fault_model_is_read_back_from_its_repr(faults):
    assert parse_faults(repr(faults)) == faults


def test_parentheses_may_be_left_out():
    assert parse_format("Float16") == parse_format("fp.Float16()") == fp.Float16()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "Affine.__init__()",
        "[x for x in range(3)]",
        "lambda: 1",
        "Affine(bits=open)",
        "Affine(*[4])",
        "Affine(**{'bits': 4})",
        "BitErrorRate(1e-3) if 1 else 2",
        "f'{1}'",
        "1 +",
        "",
        "{[]: 1}",
        "Affine(bits=4)\0",
        "(" * 100_000,
        "SECDED(" * 5_000,
    ],
)
def test_nothing_else_is_evaluated(text):
    for read in (parse_format, parse_faults):
        with pytest.raises(ConfigError, match=r"cannot read|expected something like"):
            read(text)


@pytest.mark.parametrize(("read", "text"), [(parse_format, "BitErrorRate(0.1)"), (parse_faults, "Float32()")])
def test_the_wrong_kind_is_refused(read, text):
    with pytest.raises(ConfigError, match="is not among"):
        read(text)


def test_wrong_arguments_are_refused_with_the_text_that_was_given():
    with pytest.raises(ConfigError, match=r"Affine\(bytes=4\).*bytes"):
        parse_format("Affine(bytes=4)")
    with pytest.raises(fp.FlipproofError, match="16"):
        parse_format("Affine(bits=16)")


def test_a_range_that_would_fill_the_memory_is_refused():
    assert len(parse_faults("BitPosition(range(64))").points()) == 64
    with pytest.raises(ConfigError, match="at most 10,000 numbers"):
        parse_faults("BitErrorRate(range(1000000000000))")
