from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import average_precision_score, roc_auc_score

import flipproof as fp
from flipproof.errors import MetricError
from flipproof.running.decision import CLASS_METRICS, Decision
from flipproof.running.metrics import resolve
from flipproof.running.scales import METRICS, Scale

NAN, INF = float("nan"), float("inf")


def measured(name: str, outputs: torch.Tensor, targets, decision: Decision | None = None) -> float:
    decision = decision or Decision.from_golden(torch.nan_to_num(outputs))
    return resolve(name)[0].measure(outputs, torch.as_tensor(targets), decision, outputs)


def multiclass(seed: int, *, n: int = 60, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    logits = torch.randn(n, classes, generator=generator) + 1.5 * torch.nn.functional.one_hot(targets, classes)
    return logits, targets


def test_named_metrics():
    assert CLASS_METRICS == ("accuracy", "auroc", "average_precision")
    assert [metric.name for metric in resolve(list(METRICS))] == list(METRICS)


def test_accuracy_counts_right_answers_over_all_samples():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [NAN, 1.0], [1.0, INF]])
    assert measured("accuracy", outputs, [0, 0, 1, 1]) == 0.5  # the NaN row is wrong and stays in the denominator


def test_accuracy_of_nothing_but_nan_is_zero_for_every_kind_of_output():
    for shape in ((5, 3), (5,), (5, 1)):
        golden = torch.randn(shape)
        outputs = torch.full(shape, NAN)
        assert measured("accuracy", outputs, torch.zeros(5, dtype=torch.int64), Decision.from_golden(golden)) == 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("column", [False, True])
def test_binary_auroc_and_average_precision_equal_sklearn(seed, column):
    rng = np.random.default_rng(seed)
    targets = np.arange(50) % 2
    scores = np.round(rng.normal(targets, 1.0), 1)  # rounding makes ties
    outputs = torch.tensor(scores, dtype=torch.float32).reshape((-1, 1) if column else (-1,))
    assert measured("auroc", outputs, targets) == pytest.approx(roc_auc_score(targets, scores), abs=1e-6)
    expected = average_precision_score(targets, scores)
    assert measured("average_precision", outputs, targets) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_multiclass_equals_sklearn_one_vs_rest_macro(seed, kind):
    logits, targets = multiclass(seed)
    probabilities = softmax(logits.double().numpy(), axis=1)
    outputs = logits if kind == "logits" else torch.from_numpy(probabilities)
    assert Decision.from_golden(outputs).outputs == kind
    expected = roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    assert measured("auroc", outputs, targets) == pytest.approx(expected, abs=1e-6)
    expected = average_precision_score(np.eye(4)[targets], probabilities, average="macro")
    assert measured("average_precision", outputs, targets) == pytest.approx(expected, abs=1e-6)


def test_two_outputs_give_the_auroc_of_either_class():
    logits, targets = multiclass(3, classes=2)
    expected = roc_auc_score(targets, (logits[:, 1] - logits[:, 0]).double())
    assert measured("auroc", logits, targets) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_saturated_logits_are_ranked_like_their_probabilities(seed):
    logits, targets = multiclass(seed)
    logits = torch.where(torch.rand(logits.shape) < 0.3, 1000.0 * logits.sign(), logits)
    probabilities = softmax(logits.double().numpy(), axis=1)
    expected = roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    assert measured("auroc", logits, targets) == pytest.approx(expected, abs=1e-6)


def test_single_logits_keep_their_order_where_a_float32_sigmoid_would_tie():
    outputs = torch.tensor([20.0, 40.0, 60.0, 1000.0])
    assert measured("auroc", outputs, [0, 0, 1, 1]) == 1.0
    assert measured("auroc", outputs, [1, 1, 0, 0]) == 0.0


def test_all_scores_equal_is_chance():
    assert measured("auroc", torch.zeros(6), [0, 1] * 3, Decision("logits", 2, 0.0)) == 0.5


def test_infinite_logits_share_the_whole_probability():
    outputs = torch.tensor([[INF, 0.0, 1.0], [0.0, INF, INF], [-INF, -INF, -INF], [1.0, -INF, 0.0]])
    shares = Decision("logits", 3, None).scores(outputs)
    e = np.e
    expected = [[1, 0, 0], [0, 0.5, 0.5], [1 / 3] * 3, [e / (1 + e), 0, 1 / (1 + e)]]
    np.testing.assert_allclose(shares.numpy(), expected)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_due_samples_are_ranked_worst(seed, share):
    rng = np.random.default_rng(seed)
    targets = np.arange(24) % 3
    probabilities = softmax(rng.normal(size=(24, 3)), axis=1)
    lost = rng.random(24) < share
    outputs = torch.from_numpy(probabilities.copy())
    outputs[torch.from_numpy(lost), int(rng.integers(3))] = NAN  # one NaN is enough
    areas, precisions = [], []
    for label in range(3):
        positive = targets == label
        replaced = np.where(lost, np.where(positive, -1.0, 2.0), probabilities[:, label])
        areas.append(roc_auc_score(positive, replaced))
        precisions.append(average_precision_score(positive, replaced))
    decision = Decision("probabilities", 3, None)
    assert measured("auroc", outputs, targets, decision) == pytest.approx(np.mean(areas), abs=1e-6)
    assert measured("average_precision", outputs, targets, decision) == pytest.approx(np.mean(precisions), abs=1e-6)


def test_nothing_but_nan_has_an_auroc_of_zero():
    targets = torch.arange(9) % 3
    assert measured("auroc", torch.full((9, 3), NAN), targets, Decision("logits", 3, None)) == 0.0
    assert measured("auroc", torch.full((4,), NAN), [0, 1, 0, 1], Decision("logits", 2, 0.0)) == 0.0


def test_a_nan_is_worse_than_an_infinite_score():
    decision = Decision("logits", 2, 0.0)
    assert measured("auroc", torch.tensor([-INF, NAN]), [0, 1], decision) == 0.0
    assert measured("auroc", torch.tensor([NAN, INF]), [0, 1], decision) == 0.0


@pytest.mark.parametrize("name", ["auroc", "average_precision"])
@pytest.mark.parametrize("targets", [[0, 0, 0], [1, 1, 1]])
def test_one_class_has_no_ranking(name, targets):
    with pytest.raises(MetricError, match=rf"{name} is undefined: (0|3) of 3 targets are of class 1"):
        measured(name, torch.randn(3), targets, Decision("logits", 2, 0.0))


def test_a_class_without_a_sample_is_named():
    with pytest.raises(MetricError, match="0 of 4 targets are of class 2"):
        measured("auroc", torch.randn(4, 3), [0, 1, 0, 1])


def test_functions_get_copies_of_outputs_and_targets_as_they_are():
    seen = []

    def margin(outputs, targets):
        seen.append((outputs, targets))
        return torch.tensor(0.25)

    outputs, targets = torch.tensor([[NAN, 1.0]]), torch.tensor([1])
    (metric,) = resolve(margin)
    assert metric.name == "margin"
    assert metric.measure(outputs, targets, Decision("logits", 2, None), outputs) == 0.25
    for theirs, ours in zip(seen[0], (outputs, targets), strict=True):
        assert theirs is not ours
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


def test_torchmetrics_objects_are_named_after_their_class_and_start_afresh():
    (metric,) = resolve(torchmetrics.classification.MulticlassF1Score(num_classes=2))
    decision = Decision("logits", 2, None)
    right, wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([1, 0])
    assert metric.name == "multiclass_f1_score"
    assert [metric.measure(outputs, targets, decision, outputs) for outputs in (wrong, right, wrong)] == [0.0, 1.0, 0.0]


def test_a_mapping_names_functions():
    one, two = resolve({"one": lambda outputs, targets: 1, "two": lambda outputs, targets: 2.0})
    decision = Decision("logits", 2, None)
    assert (one.name, one.measure(torch.zeros(1, 2), torch.zeros(1), decision, torch.zeros(1, 2))) == ("one", 1.0)
    assert (two.name, two.measure(torch.zeros(1, 2), torch.zeros(1), decision, torch.zeros(1, 2))) == ("two", 2.0)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("acuracy", "unknown metric 'acuracy': choose among accuracy"),
        (["accuracy", "accuracy"], "no name twice"),
        ([], "at least one metric"),
        ({}, "at least one metric"),
        ([3], "a metric is a name or a function"),
        ({"accuracy": "accuracy"}, "a metric is a name or a function"),
        (lambda outputs, targets: 0.0, "pass metrics={'my_name': function}"),
        ({"due": lambda outputs, targets: 0.0}, "column name of its own, got 'due'"),
        ({"accuracy": lambda outputs, targets: 85.0}, "column name of its own, got 'accuracy'"),
        ({"my metric": lambda outputs, targets: 0.0}, "column name of its own"),
    ],
)
def test_bad_metrics_say_what_is_wrong(metrics, message):
    with pytest.raises(MetricError, match=message):
        resolve(metrics)


class TestWhatANumberMeans:
    def test_builtins_are_shares_and_bare_functions_are_unknown(self):
        for name in CLASS_METRICS:
            scale = resolve(name)[0].scale
            assert (scale.unit, scale.range, scale.higher_is_better, scale.worst) == ("%", (0, 1), True, 0)
        scale = resolve(len)[0].scale
        assert (scale.unit, scale.range, scale.higher_is_better) == ("", (-INF, INF), None)
        assert np.isnan(scale.worst)

    def test_torchmetrics_know_which_way_is_better(self):
        (metric,) = resolve(torchmetrics.classification.MulticlassF1Score(num_classes=2))
        assert metric.scale.higher_is_better is True
        (metric,) = resolve(torchmetrics.classification.MulticlassCalibrationError(num_classes=2))
        assert metric.scale.higher_is_better is False

    def test_said_by_the_user(self):
        metric = fp.Metric(len, name="length", unit="m", range=(0, None), higher_is_better=False)
        assert resolve([metric, "accuracy"])[0] is metric
        assert metric.scale == Scale("m", (0, INF), False)
        assert resolve({"other": metric})[0].name == "other"
        assert metric.name == "length"
        assert fp.Metric(len, range=(0, 5), higher_is_better=False).scale.worst == 5
        assert fp.Metric("accuracy", name="top1").scale.per_sample

    @pytest.mark.parametrize("scale", [Scale("%", (0, 1), True, True), Scale("m", (0, INF), False), Scale()])
    def test_journals_keep_it(self, scale):
        assert Scale.from_json(json.loads(json.dumps(scale.to_json(), allow_nan=False)), "here") == scale

    @pytest.mark.parametrize(
        ("unit", "value", "text"),
        [
            ("", 11.3344, "11.33"), ("", INF, "∞"), ("", -INF, "−∞"), ("", NAN, "–"), ("%", 0.12345, "12.3"),
            ("%", -1e-9, "0.0"), ("m", 0.00012345, "0.0001234"), ("", 123456.7, "123,457"),
            ("", 0.0, "0"), ("", -0.0, "0"),
        ],
    )  # fmt: skip
    def test_numbers_as_people_write_them(self, unit, value, text):
        assert Scale(unit).text(value) == text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"function": "f2"}, r"unknown metric 'f2': choose among accuracy, auroc, average_precision"),
            ({"function": 3}, "a metric is a name or a function"),
            ({"function": len, "name": "due"}, "a column name of its own"),
            ({"function": len, "range": (1, 0)}, "len: range= takes"),
            ({"function": len, "range": "ab"}, "len: range= takes"),
            ({"function": "auroc", "unit": "m"}, "what auroc means is known"),
        ],
    )
    def test_nonsense_is_named(self, arguments, message):
        with pytest.raises(MetricError, match=message):
            fp.Metric(**arguments)


def test_what_a_metric_writes_to_is_its_own(mlp, blobs):
    def careless(outputs, targets):
        found = torch.nan_to_num_(outputs).softmax(dim=1).amax(dim=1).mean()
        outputs.zero_()
        targets.fill_(1)
        return found

    setup = {"data": blobs, "faults": fp.BitErrorRate(0.05), "trials": 20}
    both = fp.assess(mlp, **setup, metrics=[careless, "accuracy"])
    alone = fp.assess(mlp, **setup)
    assert both.golden["accuracy"] == alone.golden["accuracy"]
    columns = ["accuracy", "masked", "non_critical_sdc", "critical_sdc", "due"]
    assert both.trials[columns].equals(alone.trials[columns])


@pytest.mark.parametrize(
    "names",
    [["coverage"], ["masked_low"], ["due_high"], ["critical_total_tail"], ["m", "m_low"], ["m", "m_drop"],
     ["m", "m_drop_samples_low"], ["m", "m_gain"], ["memory"], ["gain_trials"], ["fault_free"], ["accuracy_tail"]],
    ids=str,
)  # fmt: skip
def test_names_that_tables_make_of_others_are_refused(names, mlp, blobs):
    metrics = {name: (lambda outputs, targets: 0.5) for name in names}
    metrics = (
        metrics
        if len(names) > 1 or names != ["accuracy_tail"]
        else [*map(fp.Metric, ["accuracy"]), fp.Metric(lambda o, t: 0.5, name="accuracy_tail")]
    )
    with pytest.raises(MetricError, match="column"):
        fp.assess(mlp, blobs, faults=fp.RandomBits(1), trials=2, metrics=metrics)


def test_a_number_too_large_is_named(mlp, blobs):
    with pytest.raises(MetricError, match="huge gives 1000"):
        fp.assess(mlp, blobs, faults=fp.RandomBits(1), trials=2, metrics={"huge": lambda outputs, targets: 10**400})
