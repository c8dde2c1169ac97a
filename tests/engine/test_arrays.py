from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from flipproof.engine.arrays import DTYPES, array_from_json, array_to_json


@given(st.sampled_from(DTYPES).flatmap(lambda name: arrays(name, array_shapes(min_dims=0, max_dims=3, min_side=0))))
def test_every_bit_comes_back(values):
    found = array_from_json(json.loads(json.dumps(array_to_json(values))))
    assert found.dtype == values.dtype
    assert found.shape == values.shape
    assert found.tobytes() == values.tobytes()
    assert found.flags.writeable


def test_other_kinds_are_not_written():
    with pytest.raises(TypeError, match="object"):
        array_to_json(np.array([None]))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "object"},
        {"dtype": 3},
        {"shape": [7]},
        {"shape": [-1]},
        {"shape": [2**40]},
        {"shape": "3"},
        {"shape": [1] * 9},
        {"bytes": "!"},
        {"bytes": "AAAA"},
        {"bytes": None},
        {"more": 1},
    ],
)
def test_what_does_not_fit_is_refused(change):
    with pytest.raises(ValueError, match="array"):
        array_from_json(array_to_json(np.arange(3)) | change)


def test_a_bomb_is_not_inflated():
    small = array_to_json(np.zeros(10**6, np.uint8))
    with pytest.raises(ValueError, match="takes 4 bytes, got 5"):
        array_from_json(small | {"shape": [4]})
