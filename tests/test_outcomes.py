from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flipproof.errors import DataError
from flipproof.outcomes import OUTCOMES, Decision, Outcome, classify

NAN, INF = float("nan"), float("inf")
LOGITS = Decision("logits", 3, None)
PACKING = {torch.float64: "<d", torch.float32: "<f", torch.float16: "<e"}


def named(golden, faulty, decision):
    return [OUTCOMES[i] for i in classify(torch.as_tensor(golden), torch.as_tensor(faulty), decision).tolist()]


def decided(row: list[float], threshold: float | None) -> int:
    """The class of one sample, in plain Python."""
    if threshold is not None:
        return int(row[0] > threshold)
    return max(range(len(row)), key=lambda i: (row[i], -i))


def judged(golden: list[float], faulty: list[float], packing: str, threshold: float | None) -> str:
    """The outcome of one sample, in plain Python."""
    if any(math.isnan(value) for value in faulty):
        return "due"
    if [struct.pack(packing, v) for v in golden] == [struct.pack(packing, v) for v in faulty]:
        return "masked"
    return "non_critical_sdc" if decided(golden, threshold) == decided(faulty, threshold) else "critical_sdc"


def test_the_four_classes_in_their_order():
    assert OUTCOMES == ("masked", "non_critical_sdc", "critical_sdc", "due")
    assert [outcome.value for outcome in Outcome] == list(OUTCOMES)


def test_masked_is_bit_identical_and_the_sign_of_a_zero_counts():
    assert named([[0.0, 2.0, 1.0]], [[-0.0, 2.0, 1.0]], LOGITS) == ["non_critical_sdc"]
    assert named([[-0.0, 2.0, 1.0]], [[-0.0, 2.0, 1.0]], LOGITS) == ["masked"]


def test_one_unit_in_the_last_place_is_not_masked():
    golden = torch.tensor([[1.0, 0.0, 0.0]])
    nudged = torch.nextafter(golden, torch.tensor(2.0))
    assert named(golden, nudged, LOGITS) == ["non_critical_sdc"]


def test_any_nan_is_due_even_where_the_class_survives():
    golden = [[1.0, 0.0, 0.0]] * 3
    faulty = [[1.0, 0.0, NAN], [NAN, NAN, NAN], [1.0, 0.0, 0.0]]
    assert named(golden, faulty, LOGITS) == ["due", "due", "masked"]


def test_infinities_are_values_like_others():
    golden = [[1.0, 0.0, 0.0]] * 5
    faulty = [[INF, 0.0, 0.0], [0.0, INF, 0.0], [1.0, -INF, 0.0], [INF, INF, 0.0], [-INF, -INF, -INF]]
    # equal infinities: the first wins, as for any tie
    expected = ["non_critical_sdc", "critical_sdc", "non_critical_sdc", "non_critical_sdc", "non_critical_sdc"]
    assert named(golden, faulty, LOGITS) == expected


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_single_logit_has_its_border_at_zero(shape):
    golden = torch.tensor([1.0, 1.0, -1.0, 5.0]).reshape(shape)
    decision = Decision.from_golden(golden)
    assert decision == Decision("logits", 2, 0.0)
    faulty = torch.tensor([0.5, 0.0, 0.1, NAN]).reshape(shape)
    assert named(golden, faulty, decision) == ["non_critical_sdc", "critical_sdc", "critical_sdc", "due"]


def test_single_probability_has_its_border_at_one_half():
    golden = torch.tensor([0.9, 0.9, 0.2, 1.0])
    decision = Decision.from_golden(golden)
    assert decision == Decision("probabilities", 2, 0.5)
    faulty = torch.tensor([0.6, 0.5, INF, 1.0])
    assert named(golden, faulty, decision) == ["non_critical_sdc", "critical_sdc", "critical_sdc", "masked"]


def test_probabilities_of_several_classes_are_recognised():
    softmax = torch.softmax(torch.randn(20, 5), dim=1)
    assert Decision.from_golden(softmax) == Decision("probabilities", 5, None)
    assert Decision.from_golden(softmax.to(torch.bfloat16)) == Decision("probabilities", 5, None)
    assert Decision.from_golden(softmax + 0.1) == Decision("logits", 5, None)
    assert Decision.from_golden(softmax * 2).outputs == "logits"


@pytest.mark.parametrize("shape", [(), (3, 4, 5), (3, 0)])
def test_other_shapes_are_refused_with_a_way_out(shape):
    with pytest.raises(DataError, match="output="):
        Decision.from_golden(torch.zeros(shape))


def test_class_of_a_nan_output_is_no_class():
    outputs = torch.tensor([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert LOGITS.classes_of(outputs).tolist() == [-1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    golden = torch.tensor([[1.0, 0.0]] * 4, dtype=dtype)
    faulty = torch.tensor([[1.0, 0.0], [1.0, -0.0], [1.0, 2.0], [1.0, NAN]], dtype=dtype)
    assert named(golden, faulty, Decision("logits", 2, None)) == list(OUTCOMES)


_ODD = [0.0, -0.0, 1.0, 0.5, NAN, INF, -INF, 1e-45, 65504.0]


@given(data=st.data(), dtype=st.sampled_from(sorted(PACKING, key=str)), classes=st.integers(1, 4), n=st.integers(1, 12))
@settings(deadline=None)
def test_every_sample_has_the_outcome_that_plain_python_gives_it(data, dtype, classes, n):
    width = 8 * dtype.itemsize
    real = st.floats(width=width, allow_nan=False)
    usual = st.sampled_from([np.dtype(f"f{width // 8}").type(v) for v in _ODD])
    kind = np.dtype(f"f{width // 8}")
    golden = data.draw(hnp.arrays(kind, (n, classes), elements=real))
    faulty = data.draw(hnp.arrays(kind, (n, classes), elements=st.one_of(st.floats(width=width), usual)))
    kept = data.draw(hnp.arrays(bool, n))
    faulty[kept] = golden[kept]
    decision = Decision.from_golden(torch.from_numpy(golden))
    got = named(torch.from_numpy(golden), torch.from_numpy(faulty), decision)
    expected = [
        judged(g, f, PACKING[dtype], decision.threshold) for g, f in zip(golden.tolist(), faulty.tolist(), strict=True)
    ]
    assert got == expected
    assert sum(got.count(outcome) for outcome in OUTCOMES) == n
