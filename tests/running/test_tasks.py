"""Tasks: what is critical and right, held against loops, torchmetrics and hand-made cases; and every verb with them."""

import json
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
import torchmetrics.functional as tm
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, DataError, MetricError
from flipproof.running.judge import bits_of_rows
from flipproof.running.outcomes import classify
from flipproof.running.scales import OUTCOMES
from flipproof.running.tasks.base import padded
from flipproof.running.tasks.typed import task_read, text_of

NAN, INF = float("nan"), float("inf")
SETUP = {"faults": fp.BitErrorRate([3e-3, 3e-2]), "trials": 4, "progress": False}


def judged(task, golden, targets, raw=None):
    """A judge of these answers, without a model."""
    from flipproof.running.data import Batches

    batches = Batches((golden,), (len(golden),), targets)
    reading = task.reading(None, batches)
    return task.judge(nn.Identity(), batches, reading, golden if raw is None else reading(raw))


# --- classification ------------------------------------------------------------------------------------------------


def test_top_k_is_that_of_a_sorted_list():
    torch.manual_seed(0)
    golden, faulty = torch.randn(200, 6), torch.randn(200, 6).round()  # with ties
    targets = torch.randint(6, (200,))
    judge = judged(fp.Classification(top=3), golden, targets)
    best = [sorted(range(6), key=lambda c, row=row: (-row[c], c))[:3] for row in faulty.tolist()]
    winner = golden.argmax(dim=1).tolist()
    assert judge.critical(golden, faulty, targets).tolist() == [w not in b for w, b in zip(winner, best, strict=True)]
    assert judge.correct(faulty, targets, golden).tolist() == [
        t in b for t, b in zip(targets.tolist(), best, strict=True)
    ]
    expected = tm.classification.multiclass_accuracy(golden, targets, num_classes=6, top_k=3, average="micro")
    assert judge.measure("accuracy", golden, targets, golden) == pytest.approx(float(expected))


def test_a_fall_in_confidence_is_critical_if_asked():
    golden = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    faulty = torch.tensor([[1.9, 0.0], [0.5, 0.0], [NAN, 0.0]])
    targets = torch.tensor([0, 0, 0])
    judge = judged(fp.Classification(confidence_drop=0.2), golden, targets)
    p = torch.softmax(golden[0], 0)[0] - torch.softmax(faulty[1], 0)[0]
    assert p > 0.2
    assert judge.critical(golden, faulty, targets).tolist() == [False, True, True]
    single = judged(fp.Classification(decision="logits", confidence_drop=0.2), torch.tensor([-2.0, -2.0]), targets[:2])
    assert single.critical(torch.tensor([-2.0, -2.0]), torch.tensor([-1.9, -0.1]), targets[:2]).tolist() == [
        False,
        True,
    ]


# --- multi-label ---------------------------------------------------------------------------------------------------


def test_labels_against_torchmetrics():
    torch.manual_seed(0)
    golden, targets = torch.randn(80, 5), torch.randint(2, (80, 5))
    judge = judged(fp.MultiLabel(), golden, targets)
    said = (golden > 0).int()
    assert judge.measure("exact_match", golden, targets, golden) == pytest.approx(
        float(tm.classification.multilabel_exact_match(said, targets, num_labels=5))
    )
    assert judge.measure("label_accuracy", golden, targets, golden) == pytest.approx(
        float(tm.classification.multilabel_accuracy(said, targets, num_labels=5, average="micro"))
    )
    assert judge.measure("f1", golden, targets, golden) == pytest.approx(
        float(tm.classification.multilabel_f1_score(said, targets, num_labels=5)), abs=1e-6
    )
    assert judge.measure("auroc", golden, targets, golden) == pytest.approx(
        float(tm.classification.multilabel_auroc(torch.sigmoid(golden), targets, num_labels=5)), abs=1e-6
    )
    faulty = golden.clone()
    faulty[3, 2] *= -1
    faulty[4] *= 2
    faulty[5, 0] = NAN
    ended = [OUTCOMES[i] for i in classify(golden, faulty, judge, targets)]
    assert ended[2:6] == ["masked", "critical_sdc", "non_critical_sdc", "due"]


# --- regression ----------------------------------------------------------------------------------------------------


def test_numbers_against_torchmetrics_and_a_tolerance_each():
    torch.manual_seed(0)
    golden = torch.randn(50, 2)
    targets = (golden + 0.3 * torch.randn(50, 2)).double()
    judge = judged(fp.Regression(tolerance=[0.1, 1.0], unit="m"), golden, targets)
    assert judge.measure("mean_absolute_error", golden, targets, golden) == pytest.approx(
        float(tm.mean_absolute_error(golden.double(), targets))
    )
    assert judge.measure("root_mean_square_error", golden, targets, golden) == pytest.approx(
        float(tm.mean_squared_error(golden.double(), targets, squared=False))
    )
    assert judge.measure("r2", golden, targets, golden) == pytest.approx(float(tm.r2_score(golden.double(), targets)))
    faulty = golden.clone()
    faulty[0, 1] += 0.9
    faulty[1, 0] += 0.2
    faulty[2, 1] = INF
    faulty[3, 0] = NAN
    ended = [OUTCOMES[i] for i in classify(golden, faulty, judge, targets)]
    assert ended[:5] == ["non_critical_sdc", "critical_sdc", "critical_sdc", "due", "masked"]
    assert judge.measure("mean_absolute_error", faulty, targets, golden) == INF
    assert judge.scale("mean_absolute_error").unit == "m"
    with pytest.raises(ConfigError, match="3 tolerances for 2 outputs"):
        judged(fp.Regression(tolerance=[1, 2, 3]), golden, targets)


# --- segmentation --------------------------------------------------------------------------------------------------


def miou_by_hand(one, other, ignore):
    found = []
    for a, b, skip in zip(one, other, ignore, strict=True):
        each = []
        for label in set(a[~skip].tolist()) | set(b[~skip].tolist()):
            here, there = (a == label) & ~skip, (b == label) & ~skip
            each.append(int((here & there).sum()) / int((here | there).sum()))
        found.append(sum(each) / len(each) if each else 1.0)
    return found


def test_masks_against_loops_and_torchmetrics():
    torch.manual_seed(0)
    raw, targets = torch.randn(6, 4, 5, 7), torch.randint(4, (6, 5, 7))
    targets[0, 0] = 255
    task = fp.Segmentation(agreement=0.9)
    judge, reading = judged(task, raw, targets, raw), task.reading(None, None)
    golden = reading(raw)
    masks = raw.argmax(dim=1)
    expected = miou_by_hand(targets, masks, targets == 255)
    assert judge.quality(golden, targets, golden).tolist() == pytest.approx(expected)
    jaccard = tm.classification.multiclass_jaccard_index(masks, targets, num_classes=4, ignore_index=255)
    assert judge.measure("miou", golden, targets, golden) == pytest.approx(float(jaccard), abs=1e-6)
    assert judge.measure("pixel_accuracy", golden, targets, golden) == pytest.approx(
        float(tm.classification.multiclass_accuracy(masks, targets, num_classes=4, average="micro", ignore_index=255))
    )
    changed = raw.clone()
    changed[1, :, 0, 0] += 1e-3  # every score moves, no pixel changes
    changed[2, :, :2] = changed[2, :, :2].roll(1, dims=0)
    changed[3, 1, 0, 0] = NAN
    changed[0, :, 0] = changed[0, :, 0].roll(1, dims=0)  # pixels that do not count
    faulty = reading(changed)
    ended = [OUTCOMES[i] for i in classify(golden, faulty, judge, targets)]
    assert ended == ["non_critical_sdc", "non_critical_sdc", "critical_sdc", "due", "masked", "masked"]
    agree = miou_by_hand(masks, changed.argmax(dim=1), targets == 255)
    assert agree[2] < 0.9 <= agree[1]


def test_a_hash_tells_any_bit():
    torch.manual_seed(0)
    values = torch.randn(40, 33)
    golden = bits_of_rows(values)
    for bit in range(32):
        other = values.clone()
        other.view(torch.int32)[:, bit] ^= 1 << bit if bit < 31 else -(2**31)
        assert bool((bits_of_rows(other) != golden).any(dim=1).all())
    turned = values.flip(1)
    assert bool((bits_of_rows(turned) != golden).any(dim=1).all())
    assert len({tuple(row) for row in bits_of_rows(torch.arange(20_000.0)[:, None]).tolist()}) == 20_000
    assert not torch.equal(bits_of_rows(torch.zeros(1, 4)), bits_of_rows(-torch.zeros(1, 4)))


# --- detection -----------------------------------------------------------------------------------------------------


def boxes(*found):
    return {
        "boxes": torch.tensor([f[:4] for f in found], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([f[4] for f in found], dtype=torch.float32),
        "labels": torch.tensor([f[5] for f in found], dtype=torch.int64),
    }


CAR, MAN = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 40.0)


def test_boxes_missed_and_made_up():
    task = fp.Detection()
    golden = [boxes((*CAR, 0.9, 1), (*MAN, 0.8, 2), (1, 1, 2, 2, 0.1, 3))] * 7
    faulty = [
        golden[0],
        boxes((*CAR, 0.9, 1), (*MAN, 0.7, 2), (1, 1, 2, 2, 0.1, 3)),  # another score
        boxes((*CAR, 0.9, 1), (1, 1, 2, 2, 0.1, 3)),  # a miss
        boxes((*CAR, 0.9, 1), (*MAN, 0.8, 2), (1, 1, 9, 9, 0.6, 3)),  # a ghost
        boxes((*CAR, 0.9, 2), (*MAN, 0.8, 2)),  # another class
        boxes((0, 0, 10, 4.9, 0.9, 1), (*MAN, 0.8, 2)),  # an overlap of 0.49
        boxes((*CAR, NAN, 1), (*MAN, 0.8, 2)),
    ]
    reading = task.reading(None, None)
    targets = task.read_targets([{"boxes": [list(CAR), list(MAN)], "labels": [1, 2]}] * 7, None, 0)
    judge = judged(task, torch.zeros(7, 1), targets, golden)
    one, other = reading(golden), reading(faulty)
    ended = [OUTCOMES[i] for i in classify(one, other, judge, targets)]
    assert ended == ["masked", "non_critical_sdc", *["critical_sdc"] * 4, "due"]
    assert judge.correct(one, targets, one).all()
    assert judge.quality(other, targets, one).tolist() == pytest.approx([1, 1, 2 / 3, 0.8, 0.5, 0.5, 0])
    assert judge.measure("misses", other, targets, one) == pytest.approx((0 + 0 + 1 + 0 + 1 + 1 + 2) / 14)
    assert judge.measure("ghosts", other, targets, one) == pytest.approx((0 + 0 + 0 + 1 + 1 + 1 + 0) / 7)


def test_average_precision_is_that_of_coco():
    pytest.importorskip("pycocotools")
    torch.manual_seed(0)
    found, wanted = [], []
    for _ in range(5):
        corner = torch.rand(4, 2) * 50
        real = torch.cat([corner, corner + 10 + torch.rand(4, 2) * 20], dim=1)
        found.append(
            {"boxes": real + torch.randn(4, 4) * 3, "scores": torch.rand(4), "labels": torch.tensor([1, 1, 2, 2])}
        )
        wanted.append({"boxes": real, "labels": torch.tensor([1, 1, 2, 2])})
    task = fp.Detection()
    targets = task.read_targets(wanted, None, 0)
    judge = judged(task, torch.zeros(5, 1), targets, found)
    rows = task.reading(None, None)(found)
    from torchmetrics.detection import MeanAveragePrecision

    coco = MeanAveragePrecision()
    coco.update(found, wanted)
    assert judge.measure("mean_average_precision", rows, targets, rows) == pytest.approx(float(coco.compute()["map"]))


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [True, False])
def test_sequences_against_loops_and_torchmetrics(scores):
    torch.manual_seed(0)
    raw, targets = torch.randn(6, 5, 9), torch.randint(9, (6, 5))
    targets[0, 3:] = -100
    task = fp.Tokens(agreement=0.75, perplexity=scores)
    judge = judged(task, raw, targets, raw)
    from flipproof.running.data import Batches

    reading = task.reading(None, Batches((raw,), (6,), targets))
    golden = reading(raw)
    counted = targets != -100
    right = ((raw.argmax(dim=2) == targets) & counted).sum(dim=1) / counted.sum(dim=1)
    assert judge.quality(golden, targets, golden).tolist() == pytest.approx(right.tolist())
    if scores:
        assert judge.measure("perplexity", golden, targets, golden) == pytest.approx(
            float(tm.text.perplexity(raw.double(), targets, ignore_index=-100)), rel=1e-6
        )
    changed = raw.clone()
    changed[1] += 1e-4
    changed[2, 0] = changed[2, 0].roll(1)  # one of five
    changed[3, :2] = changed[3, :2].roll(1, dims=1)  # two of five
    changed[4, 0, 0] = NAN
    changed[0, 3:] = changed[0, 3:].roll(1, dims=1)  # what does not count
    ended = [OUTCOMES[i] for i in classify(golden, reading(changed), judge, targets)]
    assert ended == ["non_critical_sdc", "non_critical_sdc", "non_critical_sdc", "critical_sdc", "due", "masked"]


def test_perplexity_of_broken_scores():
    golden, targets = torch.zeros(1, 1, 4), torch.tensor([[1]])
    judge = judged(fp.Tokens(), golden, targets)
    assert judge.measure("perplexity", golden, targets, golden) == pytest.approx(4)
    for row, expected in (([0, INF, 0, 0], 1), ([INF, INF, 0, 0], 2), ([INF, 0, 0, 0], INF), ([NAN, 0, 0, 0], INF)):
        assert judge.measure("perplexity", torch.tensor([[row]]), targets, golden) == pytest.approx(expected)


class Chars(nn.Module):
    def __init__(self, length=7):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, x):
        return self.out(torch.relu(self.embed(x)))


def test_sequences_of_several_lengths_and_the_next_token():
    torch.manual_seed(0)
    net = Chars()
    batches = [(x, x) for x in (torch.randint(11, (3, 6)), torch.randint(11, (2, 9)))]
    found = fp.assess(net, batches, **SETUP, task=fp.Tokens(shift=True))
    total, counted = 0.0, 0
    for x, _ in batches:
        logp = torch.log_softmax(net(x).detach().double(), dim=2)[:, :-1].gather(2, x[:, 1:, None])
        total, counted = total - float(logp.sum()), counted + logp.numel()
    assert found.golden["perplexity"] == pytest.approx(np.exp(total / counted), rel=1e-6)
    assert found.header.task.sample == "sequence"


# --- generation ----------------------------------------------------------------------------------------------------


class Writer(nn.Module):
    """Writes three letters of what a table says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Linear(4, 3 * 26)

    def forward(self, x):
        letters = self.table(x).reshape(len(x), 3, 26).argmax(dim=2)
        return ["".join(chr(97 + int(letter)) for letter in row) for row in letters]


def share(answer, reference):
    return sum(a == b for a, b in zip(answer, reference, strict=False)) / max(len(reference), 1)


def test_texts_and_scores():
    net, x = Writer(), torch.randn(20, 4)
    texts = net(x)
    exact = fp.assess(net, [(x, texts)], **SETUP, task=fp.Generation())
    scored = fp.assess(net, [(x, texts)], **SETUP, task=fp.Generation(scorer=share, tolerance=0.5))
    assert exact.golden == {"exact_match": 1.0}
    assert scored.golden == {"score": 1.0}
    assert (scored.trials["critical_sdc"] <= exact.trials["critical_sdc"]).all()
    assert (scored.trials["masked"] == exact.trials["masked"]).all()
    assert exact.trials["critical_sdc"].sum() > 0
    # by hand, with the very bits
    space = fp.FaultSpace(net)
    with space.stored():
        for trial in exact.records:
            if not trial.where:
                continue
            with space.corrupted(space.faults(trial.where)):
                changed = net(x)
            assert trial.outcomes["critical_sdc"] == sum(a != b for a, b in zip(changed, texts, strict=True))


def test_token_numbers_end_where_they_end():
    task = fp.Generation(end=0, longest=6)
    reading = task.reading(None, None)
    one, other = reading(torch.tensor([[4, 5, 0, 7]])), reading([[4, 5, 0, 9, 9]])
    assert torch.equal(one, other)
    long = reading([[1] * 7, [1] * 6])
    assert not torch.equal(long[0], long[1])  # beyond what is kept, and another answer all the same
    with pytest.raises(DataError, match=r"an answer of 7 characters or tokens, and 6 are kept"):
        task.judge(None, None, None, long)


class Endless(nn.Module):
    """Writes three letters a sample, and no end of them where a bias is huge."""

    def __init__(self):
        super().__init__()
        self.more = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return ["abc" if more.abs() < 1 else "abc" * 50 for more in self.more + 0 * x[:, 0]]


def test_endless_answers_are_others_and_spoil_no_other_sample():
    net, x = Endless(), torch.zeros(4, 1)
    found = fp.assess(
        net, [(x, ["abc"] * 4)], faults=fp.BitPosition(30), trials=3, task=fp.Generation(longest=5), progress=False
    )
    assert found.trials["critical_sdc"].tolist() == [4] * len(found.trials)
    one = fp.assess(
        net,
        [(x, ["abc"] * 4)],
        faults=fp.BitPosition(30, share=0.25),
        trials=3,
        task=fp.Generation(longest=5),
        progress=False,
    )
    assert one.trials["critical_sdc"].tolist() == [1, 1, 1]
    assert one.trials["due"].sum() == 0


def apart(limit):
    return lambda golden, faulty: (golden - faulty).abs().amax(dim=1) > limit


@pytest.mark.parametrize("verb", ["assess", "inject_all", "analyze", "estimate_factors", "harden"])
def test_another_function_is_another_campaign(verb, tmp_path):
    net, data, _ = numbers()
    path = tmp_path / "journal.jsonl"
    calls = {
        "assess": lambda task: fp.assess(net, data, **SETUP, task=task, journal=path),
        "inject_all": lambda task: fp.inject_all(
            net, data, where=fp.Parameters(include="*.bias"), task=task, journal=path, progress=False
        ),
        "analyze": lambda task: fp.analyze(net, data, fp.DeepVigor(neurons=1), task=task, journal=path, progress=False),
        "estimate_factors": lambda task: fp.estimate_factors(
            net, data, margin=0.2, task=task, journal=path, progress=False
        ),
        "harden": lambda task: fp.harden(
            net, data, fp.FTClipAct(trials=1, rounds=1, bers=(1e-3, 1e-2)), task=task, journal=path, progress=False
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls[verb](fp.Custom(wrong=apart(0.1)))
        with pytest.raises(fp.FlipproofError, match=r"another|other|differ|expected"):
            calls[verb](fp.Custom(wrong=apart(5.0)))


def test_classes_that_no_mask_can_have():
    net, data, task = masks()
    wrong = [(x, torch.where(y == 3, 7, y)) for x, y in data]
    with pytest.raises(DataError, match=r"image \d+ has pixels of the class 7, but the model answers classes 0 to 3"):
        fp.assess(net, wrong, **SETUP, task=task)
    with pytest.raises(DataError, match=r"image 0: all of its pixels|image 0: all pixels"):
        fp.assess(net, [(data[0][0], torch.full_like(data[0][1], 255))], **SETUP, task=task)


def test_boxes_without_area_are_themselves():
    task = fp.Detection(score=0.0)
    found = [boxes((3, 3, 3, 3, 0.9, 1), (INF, 0, INF, 2, 0.8, 1), (*CAR, 0.7, 1))]
    targets = task.read_targets([{"boxes": [list(CAR)], "labels": [1]}], None, 0)
    judge, rows = judged(task, torch.zeros(1, 1), targets, found), task.reading(None, None)(found)
    assert judge.critical(rows, rows, targets).tolist() == [False]
    with pytest.raises(DataError, match="ends before it begins"):
        task.read_targets([{"boxes": [[5, 5, 2, 2]], "labels": [1]}], None, 0)
    two = task.read_targets([{"boxes": [list(CAR), list(MAN)], "labels": [1, 2]}], None, 0)
    with pytest.raises(DataError, match=r"2 objects, and 1 boxes are kept: say Detection\(most=2\)"):
        judged(fp.Detection(most=1), torch.zeros(1, 1), two, found)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fp.Generation(tolerance=0.5), "on a score only"),
        (lambda: fp.Generation(end="x"), "number of a token"),
    ],
)
def test_arguments_without_effect_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("task", "references", "error", "said"),
    [
        (fp.Generation(scorer=share), None, DataError, "has no reference"),
        (fp.Generation(), [[1, 2]] * 20, DataError, "references of the same kind"),
        (fp.Generation(scorer=lambda a, b: None), ["abc"] * 20, MetricError, "gives None"),
        (fp.Generation(scorer=lambda a, b: 1 / 0), ["abc"] * 20, MetricError, "scorer= raises ZeroDivisionError"),
    ],
)
def test_scorers_and_references_that_cannot_be(task, references, error, said):
    with pytest.raises(error, match=said):
        fp.assess(Writer(), [(torch.randn(20, 4), references)], **SETUP, task=task)


def test_a_class_is_no_task():
    with pytest.raises(ConfigError, match=r"an instance: Tokens\(…\)"):
        fp.assess(nn.Linear(2, 2), [(torch.zeros(2, 2), torch.zeros(2))], faults=fp.RandomBits(1), task=fp.Tokens)


# --- embedding, custom ---------------------------------------------------------------------------------------------


def test_vectors_and_their_neighbours():
    torch.manual_seed(0)
    golden, labels = torch.randn(30, 4), torch.randint(3, (30,))
    judge = judged(fp.Embedding(cosine=0.9), golden, labels)
    faulty = golden.clone()
    faulty[0] *= 3
    faulty[1] *= -1
    faulty[2] = 0
    faulty[3, 0] = NAN
    ended = [OUTCOMES[i] for i in classify(golden, faulty, judge, labels)]
    assert ended[:5] == ["non_critical_sdc", "critical_sdc", "critical_sdc", "due", "masked"]
    near = nn.functional.normalize(golden.double(), dim=1)
    near = near @ near.T - 2 * torch.eye(30)
    expected = float((labels[near.argmax(dim=1)] == labels).double().mean())
    assert judge.measure("recall_at_1", golden, labels, golden) == pytest.approx(expected)


def test_the_users_own_word():
    golden = torch.randn(4, 2)
    with pytest.raises(MetricError, match="one truth value a sample"):
        judged(fp.Custom(wrong=lambda a, b: a != b), golden, torch.zeros(4))
    with pytest.raises(ConfigError, match="golden ones themselves"):
        judged(fp.Custom(wrong=lambda a, b: torch.ones(len(a), dtype=torch.bool)), golden, torch.zeros(4))


# --- recognised ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "targets", "task"),
    [
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), "classification"),
        (torch.randn(4, 3), torch.tensor([[0], [1], [2], [0]]), "classification"),
        (torch.randn(4, 3), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]]), "multi-label classification"),
        (torch.randn(4, 6, 3), torch.randint(3, (4, 6)), "tokens"),
        (torch.randn(4, 3, 5, 6), torch.randint(3, (4, 5, 6)), "segmentation"),
    ],
)
def test_tasks_that_leave_no_doubt_are_recognised(answers, targets, task):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.answers = nn.Parameter(answers)

        def forward(self, x):
            return self.answers + 0 * x.sum()

    found = fp.assess(Fixed(), [(torch.zeros(4, 1), targets)], faults=fp.RandomBits(1), trials=2, progress=False)
    assert found.header.task.task == task
    assert task in str(found) or task == "classification"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.randn(4, 2), "task=fp.Regression"),
        (torch.randn(4), "task=fp.Regression"),
        (torch.tensor([[1, 0, 0]] * 4), "argmax"),
        (torch.randint(5, (4, 7)), "one class a sample"),
        (["a", "b"], "class numbers"),
    ],
)
def test_targets_that_leave_doubt_are_refused_with_what_to_say(targets, said):
    with pytest.raises(DataError, match=said):
        fp.assess(nn.Linear(2, 3), [(torch.zeros(4, 2), targets)], faults=fp.RandomBits(1), progress=False)


# --- every verb ----------------------------------------------------------------------------------------------------


def tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 11))
    with torch.no_grad():
        net[0].weight.clamp_(-1.9, 1.9)  # so that bit 30 is 0 in all weights
    x = torch.randint(11, (60, 5))
    return net, [(x[:30], net(x[:30]).argmax(2)), (x[30:], net(x[30:]).argmax(2))], fp.Tokens()


def masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(60, 3, 6, 6)
    return net, [(x[:30], net(x[:30]).argmax(1)), (x[30:], net(x[30:]).argmax(1))], fp.Segmentation()


def numbers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(60, 4)
    return net, [(x[:30], net(x[:30]).detach()), (x[30:], net(x[30:]).detach())], fp.Regression(tolerance=0.3)


def labels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(60, 4)
    return net, [(x[:30], (net(x[:30]) > 0).int()), (x[30:], (net(x[30:]) > 0).int())], fp.MultiLabel()


CASES = [tokens, masks, numbers, labels]


@pytest.mark.parametrize("case", CASES)
def test_workers_resuming_and_files(case, tmp_path):
    net, data, task = case()
    whole = fp.assess(net, data, **SETUP, task=task, journal=tmp_path / "a.jsonl", audit=1.0)
    parallel = fp.assess(net, data, **SETUP, task=task, workers=2)
    same = [column for column in whole.trials if column not in ("seconds", "audited")]
    assert whole.trials[same].equals(parallel.trials[same])
    again = fp.Assessment.load(tmp_path / "a.jsonl")
    assert again.summary.equals(whole.summary)
    assert again.header.task == whole.header.task
    assert again.header.task.rule
    with pytest.raises(fp.FlipproofError, match="decision"):
        fp.assess(net, data, **SETUP, task=fp.Custom(wrong=never), journal=tmp_path / "a.jsonl")


def never(golden, faulty):
    return torch.zeros(len(golden), dtype=torch.bool)


@pytest.mark.parametrize("case", CASES)
def test_neurons_and_rates(case):
    net, data, task = case()
    neurons = fp.assess(
        net, data, faults=fp.RandomBits(1), where=fp.Neurons(), trials=3, task=task, progress=False, audit=1.0
    )
    assert (neurons.trials["samples"] == 60).all()
    found = fp.estimate_rates(net, data, faults=fp.RandomBits(1), margin=0.1, task=task, progress=False)
    assert bool(found.table["met"].all())


@pytest.mark.parametrize("case", CASES)
def test_inject_all_agrees_with_assess(case):
    net, data, task = case()
    where = fp.Parameters(include="*.bias")
    table = fp.inject_all(net, data, where=where, task=task, progress=False)
    bits = fp.assess(net, data, faults=fp.BitPosition([30, 22, 5], share=1e-9), where=where, task=task, progress=False)
    assert table.done == 1.0
    for trial in bits.records:
        ((name, value, bit),) = trial.where
        row = table.flips[(table.flips["site"] == name) & (table.flips["word"] == value) & (table.flips["bit"] == bit)]
        assert len(row) == 1
        for outcome in ("non_critical_sdc", "critical_sdc", "due"):
            assert int(row[outcome].iloc[0]) == trial.outcomes[outcome]


@pytest.mark.parametrize("case", CASES)
def test_analyze_says_what_injection_says(case):
    net, data, task = case()
    found = fp.analyze(net, data, fp.DeepVigor(neurons=4), task=task, progress=False)
    checked = found.validate(data, injections=60)
    assert (checked["true_non_critical"].dropna() > 0.9).all()
    assert (checked["true_critical"].dropna() > 0.8).all()


@pytest.mark.parametrize("case", CASES)
def test_a_map_from_a_file_knows_its_task(case, tmp_path):
    net, data, task = case()
    found = fp.analyze(net, data, fp.DeepVigor(neurons=2), task=task, progress=False)
    again = fp.VulnerabilityMap.load(found.save(tmp_path / "map.safetensors"), model=net)
    assert again.task == found.task
    assert again.validate(data, injections=5).equals(found.validate(data, injections=5))


@pytest.mark.parametrize("case", CASES)
def test_harden_and_what_it_costs(case):
    net, data, task = case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        safe = fp.harden(net, data, fp.Ranger(), task=task, progress=False)
        report = fp.hardening_report(safe)
        assert report.judged.samples == 15
        area = fp.harden(net, data, fp.FTClipAct(trials=2, rounds=1, bers=(1e-3, 1e-2)), task=task, progress=False)
        if task in (fp.Tokens(), fp.MultiLabel()):
            fp.harden(net, data, fp.FitAct.quick(), task=task, progress=False)
        else:
            with pytest.raises(ConfigError, match="no choices among classes"):
                fp.harden(net, data, fp.FitAct.quick(), task=task, progress=False)
    plain = fp.assess(net, data, **SETUP, task=task)
    bounded = fp.assess(area, data, **SETUP, task=task)
    main = plain.metrics[0]
    assert bounded.summary[main].iloc[-1] >= plain.summary[main].iloc[-1] - 0.2


@pytest.mark.parametrize("case", CASES)
def test_protect_explore_and_clipping(case):
    net, data, task = case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        safe = fp.protect(net, data, ber=1e-2, trials=4, front=0, memory=0.5, task=task, progress=False)
        main = safe.metric
        assert main in safe.evidence
        assert main.replace("_", " ") in str(safe)
        assert safe.verdict == "met"
        found = fp.explore(net, data, accuracy=0.3, drop=0.7, trials=3, bits=(8, 8), task=task, progress=False)
        assert main in found.candidates
        chosen = fp.choose_clipping(net, data, task=task, progress=False, trials=4)
        assert isinstance(chosen, fp.BitClipped)
        mixed = fp.explore_mixed(net, data, memory=8 * 10_000, ber=1e-3, trials=2, task=task, progress=False)
        assert mixed.formats


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: fp.Classification(top=0),
        lambda: fp.Classification(confidence_drop=2),
        lambda: fp.MultiLabel(decision="argmax"),
        lambda: fp.Regression(tolerance=0),
        lambda: fp.Regression(tolerance="1"),
        lambda: fp.Regression(tolerance=[]),
        lambda: fp.Segmentation(agreement=0),
        lambda: fp.Detection(score=2),
        lambda: fp.Detection(most=0),
        lambda: fp.Tokens(agreement=1.5),
        lambda: fp.Generation(scorer=3),
        lambda: fp.Embedding(cosine=-1),
        lambda: fp.Custom(wrong=None),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ConfigError, match=r"takes|picks one class"):
        make()


def test_task_and_decision_do_not_contradict():
    net, x = nn.Linear(2, 3), torch.randn(9, 2)
    data = [(x, net(x).argmax(dim=1))]
    with pytest.raises(ConfigError, match="leave decision= out"):
        fp.assess(net, data, faults=fp.RandomBits(1), task=fp.Classification(), decision="logits")
    with pytest.raises(ConfigError, match="task= takes"):
        fp.assess(net, data, faults=fp.RandomBits(1), task="classification")
    with pytest.raises(MetricError, match="has no metric 'perplexity'"):
        fp.assess(net, data, faults=fp.RandomBits(1), metrics="perplexity", progress=False)


@pytest.mark.parametrize(
    "task",
    [
        fp.Classification(top=5),
        fp.MultiLabel(decision=0.3),
        fp.Regression(tolerance=(0.5, 1.0), unit="m"),
        fp.Segmentation(ignore=0),
        fp.Detection(score=0.7),
        fp.Tokens(shift=True),
        fp.Generation(end=2),
        fp.Embedding(cosine=0.5),
    ],
)
def test_the_repr_of_a_task_rebuilds_it(task):
    assert task_read(repr(task)) == task
    assert text_of(task) == repr(task)


def test_rows_of_different_lengths():
    found = padded([torch.ones(1, 2), torch.ones(2, 4)], -7)
    assert found.tolist() == [[1, 1, -7, -7], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_the_header_is_plain_json(tmp_path):
    net, data, task = numbers()
    fp.assess(net, data, **SETUP, task=task, journal=tmp_path / "a.jsonl")
    header = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert header["header"]["task"]["task"] == "regression" if "header" in header else header["task"]


def test_the_page_about_tasks(capsys):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text.partition("```python\n")[2].partition("```")[0], "tasks.md", "exec"), {})
    assert "numbers, critical if one moves by more than 0.05 m" in capsys.readouterr().out
    for name in (
        "Classification",
        "MultiLabel",
        "Regression",
        "Segmentation",
        "Detection",
        "Tokens",
        "Generation",
        "Embedding",
    ):
        assert f"`{name}(" in text


# --- what a user's own metric is given -----------------------------------------------------------------------------


def test_a_metric_of_masks_is_given_masks():
    """As torchmetrics takes them, also where scores are NaN: every pixel is then wrong."""
    torch.manual_seed(0)
    net, x = torch.nn.Conv2d(2, 3, 1).eval(), torch.randn(8, 2, 4, 5)
    jaccard = torchmetrics.classification.MulticlassJaccardIndex(num_classes=3, average="micro")
    seen = []

    def pixels(outputs, targets):
        seen.append((outputs.dtype, outputs.shape, targets.shape))
        return (outputs == targets).double().mean()

    found = fp.assess(
        net,
        [(x, net(x).argmax(dim=1))],
        faults=fp.BitErrorRate([0.01, 0.1]),
        trials=10,
        task=fp.Segmentation(),
        metrics={"mine": pixels, "iou": jaccard, "theirs": fp.Metric("pixel_accuracy")},
    )
    assert set(seen) == {(torch.int64, (8, 4, 5), (8, 4, 5))}
    assert found.golden == {"mine": 1.0, "iou": 1.0, "theirs": 1.0}
    assert found.trials["due"].sum() > 0
    assert found.trials["mine"].tolist() == pytest.approx(found.trials["theirs"].tolist())


def test_a_metric_of_tokens_without_scores_is_given_classes():
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).eval(), torch.randint(9, (6, 5))

    def mine(outputs, targets):
        assert outputs.shape == targets.shape == (6, 5)
        return (outputs == targets).double().mean()

    found = fp.assess(
        net,
        [(x, net(x).argmax(dim=2))],
        faults=fp.BitErrorRate(1e-2),
        trials=10,
        task=fp.Tokens(perplexity=False),
        metrics={"mine": mine, "theirs": fp.Metric("token_accuracy")},
    )
    assert found.golden == {"mine": 1.0, "theirs": 1.0}
    assert found.trials["mine"].tolist() == pytest.approx(found.trials["theirs"].tolist())


def test_labels_that_cannot_be_found_again_are_named():
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 8), torch.randn(6, 4)
    asked = {"faults": fp.RandomBits(1), "trials": 2, "task": fp.Embedding()}
    with pytest.warns(fp.FlipproofWarning, match="no two samples show the same"):
        assert "recall_at_1" not in fp.assess(net, [(x, torch.arange(6))], **asked).golden
    with pytest.warns(fp.FlipproofWarning, match="some samples have no target"):
        fp.assess(net, [(x[:3], None), (x[3:], torch.tensor([0, 0, 1]))], **asked)
    assert "recall_at_1" in fp.assess(net, [(x, torch.arange(6) // 2)], **asked).golden


def test_what_cannot_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"argmax.*confidence_drop"):
        fp.Classification(decision="argmax", confidence_drop=0.1)
    with pytest.raises(ConfigError, match="unit= takes text"):
        fp.Regression(tolerance=1.0, unit=3)
    net, data = torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
    with pytest.raises(ConfigError, match="progress= takes True, False or None"):
        fp.assess(net, data, faults=fp.RandomBits(1), trials=2, progress="yes")
