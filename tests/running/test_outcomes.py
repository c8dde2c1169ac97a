from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import flipproof as fp
from flipproof.campaigns.plan import Reading
from flipproof.errors import ConfigError, DataError
from flipproof.running.decision import Decision
from flipproof.running.outcomes import classify
from flipproof.running.scales import OUTCOMES, Outcome

NAN, INF = float("nan"), float("inf")
LOGITS = Decision("logits", 3, None)
PACKING = {torch.float64: "<d", torch.float32: "<f", torch.float16: "<e"}


def named(golden, faulty, decision):
    return [
        OUTCOMES[i]
        for i in classify(torch.as_tensor(golden), torch.as_tensor(faulty), decision, torch.zeros(len(golden))).tolist()
    ]


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


# --- what the user says, and what cannot be told -------------------------------------------------------------------


class Scores(nn.Module):
    """One output a sample: w · x + b, through what `last` is."""

    def __init__(self, weight: float, bias: float, last: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(1, 1), last or nn.Identity()
        with torch.no_grad():
            self.fc.weight.fill_(weight)
            self.fc.bias.fill_(bias)

    def forward(self, x):
        return self.last(self.fc(x))


def lowly(n=40):
    """Inputs in [−1, 1], all of class 1."""
    return [(torch.linspace(-1, 1, n)[:, None], torch.ones(n, dtype=torch.int64))]


SETUP = {"faults": fp.RandomBits(1), "trials": 2}


def test_single_logits_in_the_unit_interval_are_not_silently_read_as_probabilities():
    """All logits in [0.29, 0.31]: as probabilities the accuracy would be 0, in truth it is 1."""
    net = Scores(0.01, 0.3)
    with pytest.warns(fp.FlipproofWarning, match=r"\[0\.29, 0\.31\] and could be probabilities or logits.*decision="):
        found = fp.assess(net, data=lowly(), **SETUP)
    assert found.golden["accuracy"] == 1.0, "what a linear layer gives is rather a logit"
    assert found.header.decision == Reading("logits", 0.0, True)
    for choice, accuracy, threshold in (("logits", 1.0, 0.0), ("probabilities", 0.0, 0.5), (0.295, 0.75, 0.295)):
        found = fp.assess(net, data=lowly(), decision=choice, **SETUP)  # says nothing: warnings are errors
        assert found.golden["accuracy"] == pytest.approx(accuracy)
        assert found.header.decision.threshold == threshold
        assert not found.header.decision.assumed


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Flatten(0)), nn.Hardsigmoid()])
def test_what_a_sigmoid_gave_is_a_probability_without_a_word(last):
    found = fp.assess(Scores(0.5, 3.0, last), data=lowly(), **SETUP)
    assert found.header.decision == Reading("probabilities", 0.5, False)
    assert found.golden["accuracy"] == 1.0


def test_what_nobody_can_tell_is_warned_about_too():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2 + 0.5

    with pytest.warns(fp.FlipproofWarning, match="they are read as probabilities, class 1 above 0.5"):
        found = fp.assess(nn.Sequential(Scores(1.0, 0.0), Half()), data=lowly(), **SETUP)
    assert found.header.decision.assumed


def test_rows_that_sum_to_one_are_warned_about_unless_it_is_known_what_made_them():
    class Two(Scores):
        def forward(self, x):
            score = self.fc(x)
            return torch.cat([score, 1 - score], dim=1)

    class Shares(nn.Module):
        """A linear layer whose rows happen to sum to 1: logits, and the largest wins in either case."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 2)
            with torch.no_grad():
                self.fc.weight.copy_(torch.tensor([[0.3], [-0.3]]))
                self.fc.bias.fill_(0.5)

        def forward(self, x):
            return self.fc(x)

    assert fp.assess(Shares(), data=lowly(), **SETUP).header.decision.outputs == "logits"

    net = Two(0.4, 0.5)
    with pytest.warns(fp.FlipproofWarning, match="could be probabilities or logits"):
        fp.assess(net, data=lowly(), **SETUP)
    said = fp.assess(net, data=lowly(), decision="logits", metrics=("accuracy",), **SETUP)
    assert said.header.decision == Reading("logits", None, False)
    assert fp.assess(Two(0.4, 0.5), data=lowly(), decision="argmax", **SETUP).golden == said.golden
    soft = nn.Sequential(Two(3.0, 0.1), nn.Softmax(dim=1))
    assert fp.assess(soft, data=lowly(), **SETUP).header.decision.outputs == "probabilities"


@pytest.mark.parametrize(
    ("golden", "choice", "error", "message"),
    [
        (torch.tensor([3.0, -1.0]), "probabilities", DataError, "reach from -1 to 3"),
        (torch.tensor([[0.2, 0.2]]), "probabilities", DataError, "rows of the fault-free outputs sum to 0.4"),
        (torch.tensor([0.3]), "argmax", DataError, "one output a class"),
        (torch.tensor([[0.3, 0.7]]), 0.5, DataError, "threshold for a single output"),
        (torch.tensor([0.3]), "logit", ConfigError, "decision= takes None, 'logits'"),
        (torch.tensor([0.3]), True, ConfigError, "decision= takes"),
        (torch.tensor([0.3]), float("nan"), ConfigError, "decision= takes"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(golden, choice, error, message):
    with pytest.raises(error, match=message):
        Decision.from_golden(golden, choice)


def test_the_threshold_decides_outcomes_and_ranking_does_not_need_it():
    golden = torch.tensor([0.2, 0.4, 0.8])
    rule = Decision.from_golden(golden, 0.3)
    assert rule.classes_of(golden).tolist() == [0, 1, 1]
    assert named(golden, torch.tensor([0.29, 0.31, 0.25]), rule) == [
        "non_critical_sdc",
        "non_critical_sdc",
        "critical_sdc",
    ]
    assert Decision.from_golden(torch.tensor([-4.0, 9.0]), 2).outputs == "logits"


def test_every_front_door_takes_the_decision():
    net, data = Scores(0.01, 0.3), lowly(8)
    hit = nn.Sequential(net, nn.ReLU())
    assert fp.analyze(net, data, fp.DeepVigor(neurons=1), decision="logits").task == fp.Classification(
        decision="logits"
    )
    assert len(fp.estimate_factors(net, data, decision="logits", margin=0.2)) == 1
    safe = fp.harden(hit, fp.Ranger(), data=data, decision="logits")
    assert fp.assess(safe, data=data, decision="logits", **SETUP).golden["accuracy"] == 1.0
    with pytest.warns(fp.FlipproofWarning, match="could be probabilities or logits"):
        fp.analyze(net, data, fp.DeepVigor(neurons=1))
    with pytest.warns(fp.FlipproofWarning, match="could be probabilities or logits"):
        fp.harden(hit, fp.Ranger(), data=data)


def test_several_labels_beside_other_answers_are_told_what_to_say():
    targets = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    with pytest.raises(
        DataError, match=r"several or no positive labels in 2 rows; if the model gives a score for each"
    ):
        fp.assess(nn.Linear(2, 4), data=[(torch.randn(3, 2), targets)], **SETUP)
    with pytest.raises(DataError, match=r"one-hot targets go through \.argmax"):
        fp.assess(nn.Linear(2, 3), data=[(torch.randn(3, 2), torch.eye(3))], **SETUP)
