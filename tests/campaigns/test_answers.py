from __future__ import annotations

import zlib
from base64 import b64encode

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flipproof.campaigns.answers import decode_answers, decode_golden, encode_answers, encode_golden, holds
from flipproof.errors import JournalError
from flipproof.running.scales import OUTCOMES


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=300))
def test_what_was_written_is_read(pairs):
    outcomes, correct = (torch.tensor(column) for column in zip(*pairs, strict=True))
    golden = decode_golden(encode_golden(correct), len(pairs))
    assert golden.tolist() == correct.tolist()
    codes = decode_answers(encode_answers(outcomes, correct), golden)
    assert (codes & 3).tolist() == outcomes.tolist()
    assert holds(codes, "correct").tolist() == correct.int().tolist()
    for index, name in enumerate(OUTCOMES):
        assert holds(codes, name).tolist() == (outcomes == index).int().tolist()
    assert holds(codes, "critical_total").tolist() == (outcomes >= 2).int().tolist()


def test_a_masked_trial_takes_no_room():
    correct = torch.tensor([True, False, True])
    assert encode_answers(torch.zeros(3, dtype=torch.int64), correct) == ""
    assert decode_answers("", correct.numpy()).tolist() == [4, 0, 4]


def test_ten_thousand_answers_are_small():
    outcomes = (torch.rand(10_000) < 0.05).long() * 2
    assert len(encode_answers(outcomes, torch.rand(10_000) < 0.9)) < 3000


def packed(content: bytes) -> str:
    return b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not base64!", "cannot be read"),
        (b64encode(b"not zlib").decode(), "cannot be read"),
        (packed(bytes(2)), "of 2 samples, its campaign has 3"),
        (packed(bytes(10**8)), "of more than 3 samples, its campaign has 3"),
    ],
)
def test_damage_is_named_and_no_more_is_unpacked_than_there_are_samples(text, message):
    with pytest.raises(JournalError, match=message):
        decode_answers(text, np.ones(3, bool))
