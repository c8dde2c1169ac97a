from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flipproof as fp
from flipproof.campaigns.record import Trial
from flipproof.engine.journal import SCHEMA, Journal
from flipproof.errors import JournalError, JournalLocked, JournalMismatch

pytestmark = pytest.mark.usefixtures("a_line_a_record")


def records_of(result):
    return [replace(record, seconds=0.0) for record in result.records]


@pytest.fixture
def journal(tmp_path) -> Path:
    return tmp_path / "runs" / "journal.jsonl"


@pytest.fixture
def setup(blobs, journal):
    return {"data": blobs, "faults": fp.RandomBits([1, 30]), "trials": 3, "seed": 5, "journal": journal}


def test_header_and_lines(mlp, setup, journal):
    result = fp.assess(mlp, **setup)
    header, *trials = [json.loads(line) for line in journal.read_text().splitlines()]
    assert header["flipproof_journal"] == SCHEMA == 2
    assert header["golden"] == result.golden
    assert header["plan"] == {"trials": 3, "margin": None, "confidence": 0.95}
    assert header["fingerprint"]["bits"] == result.bits == 67 * 32
    assert [point["coordinates"] for point in header["points"]] == [{"count": 1}, {"count": 30}]
    assert [stored["name"] for stored in header["stored"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert header["versions"]["torch"] == torch.__version__
    assert len(trials) == 6
    for trial, record in zip(trials, result.records, strict=True):
        assert Trial.from_json(trial) == record
        assert sum(trial["outcomes"].values()) == trial["samples"] == 30
        assert trial["versions"] == header["versions"]
        assert len(trial["where"]) == (1 if trial["faults"] == 1 else 0)


def test_loading_gives_what_the_live_campaign_gave(mlp, setup, journal):
    live = fp.assess(mlp, **setup)
    loaded = fp.Assessment.load(journal)
    assert loaded.records == live.records
    assert loaded.golden == live.golden
    assert loaded.trials.equals(live.trials)
    assert loaded.summary.equals(live.summary)
    assert repr(loaded) == repr(live)


def test_numbers_that_json_has_no_word_for(mlp, setup, journal):
    values = iter([1.0, float("nan"), float("inf"), float("-inf"), 0.1, 2.0, 1e300])
    live = fp.assess(mlp, **setup, metrics={"loss": lambda outputs, targets: next(values)})
    loaded = fp.Assessment.load(journal)
    assert loaded.trials["loss"].equals(live.trials["loss"])
    assert [str(value) for value in loaded.trials["loss"]] == ["nan", "inf", "-inf", "0.1", "2.0", "1e+300"]
    for line in journal.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


CHANGES = {
    "weights": lambda model, setup: model[0].bias.data.add_(1e-3),
    "data": lambda model, setup: setup["data"][1][0].data.view(-1)[3].neg_(),
    "seed": lambda model, setup: setup.update(seed=6),
    "faults": lambda model, setup: setup.update(faults=fp.RandomBits([1, 31])),
    "format": lambda model, setup: setup.update(format=fp.FixedPoint()),
    "metrics": lambda model, setup: setup.update(metrics=("accuracy", "auroc")),
    "where": lambda model, setup: setup.update(where=fp.Parameters(include="2")),
    "output": lambda model, setup: setup.update(output=lambda raw: raw),
    "structure": lambda model, setup: model.append(torch.nn.Identity()),
}


class TestRefusal:
    @pytest.mark.parametrize("field", CHANGES)
    def test_another_campaign_is_told_apart(self, mlp, setup, journal, field):
        fp.assess(mlp, **setup)
        content = journal.read_bytes()
        CHANGES[field](mlp, setup)
        before = [p.detach().clone() for p in mlp.parameters()]
        with pytest.raises(
            JournalMismatch, match=rf"(?s)holds another campaign.*\n  {field}: .* → .*\nResume"
        ) as error:
            fp.assess(mlp, **setup)
        named = {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]}
        also = {
            "weights": {"golden_outputs"},
            "data": {"golden_outputs"},
            "format": {"golden_outputs"},
            "metrics": {"metrics_code"},
            "where": {"format", "bits"},
            "output": {"output_code"},
            "structure": {"code", "attributes"},
        }.get(field, set())
        assert named == {field} | also
        assert journal.read_bytes() == content
        assert all(torch.equal(p, q) for p, q in zip(before, mlp.parameters(), strict=True))

    def test_labels_and_batch_borders_belong_to_the_data(self, mlp, setup):
        fp.assess(mlp, **setup)
        (x, y), (x2, y2) = setup["data"]
        relabelled = [(x, y.flip(0)), (x2, y2)]
        one_batch = [(torch.cat([x, x2]), torch.cat([y, y2]))]
        for data in (relabelled, one_batch):
            with pytest.raises(JournalMismatch, match=r"\n  data: "):
                fp.assess(mlp, **{**setup, "data": data})

    def test_an_equal_model_and_equal_data_are_the_same(self, mlp, setup, journal):
        first = fp.assess(mlp, **setup)
        again = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        again.load_state_dict(mlp.state_dict())
        setup["data"] = [(x.clone(), y.clone()) for x, y in setup["data"]]
        assert fp.assess(again, **setup).records == first.records

    def test_an_address_in_a_repr_is_no_difference(self, mlp, setup):
        class Wrapped(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner, self.act = inner, object()

            def extra_repr(self):
                return f"act={self.act}"

            def forward(self, x):
                return self.inner(x)

        first, second = Wrapped(mlp), Wrapped(mlp)
        assert repr(first) != repr(second)
        assert fp.assess(first, **setup).records == fp.assess(second, **setup).records


class TestDamage:
    def test_a_torn_tail_is_dropped_wherever_it_was_torn(self, mlp, setup, journal):
        setup["faults"] = fp.RandomBits(1)
        whole = fp.assess(mlp, **setup)
        content = journal.read_bytes()
        last = content[:-1].rfind(b"\n") + 1
        for kept in [*range(last, len(content), 3), len(content) - 1]:
            journal.write_bytes(content[:kept])
            assert fp.Assessment.load(journal).records == whole.records[:2]
            assert journal.stat().st_size == kept  # reading changes nothing
            resumed = fp.assess(mlp, **setup)
            assert records_of(resumed) == records_of(whole)
            assert resumed.records[:2] == whole.records[:2]
            lines = journal.read_bytes().splitlines(keepends=True)
            assert len(lines) == 4
            assert b"".join(lines[:3]) == content[:last]
            assert Trial.from_json(json.loads(lines[3])) == resumed.records[2]

    def test_a_header_torn_before_its_end_holds_nothing_and_is_written_again(self, mlp, setup, journal):
        whole = fp.assess(mlp, **setup)
        header = journal.read_bytes().split(b"\n")[0]
        for kept in (0, 1, 10, 30, len(header)):
            journal.write_bytes(header[:kept])
            assert records_of(fp.assess(mlp, **setup)) == records_of(whole)

    @pytest.mark.parametrize("number", [2, 3, 6])
    @pytest.mark.parametrize("damage", [b"{", b"", b"null", b'{"point": 0}', b"\xff\xfe", b"[1, 2]", b"7"])
    def test_a_damaged_line_is_refused_with_its_number(self, mlp, setup, journal, number, damage):
        fp.assess(mlp, **setup)
        lines = journal.read_bytes().splitlines(keepends=True)
        lines[number - 1] = damage + b"\n"
        journal.write_bytes(b"".join(lines))
        for use in (lambda: fp.assess(mlp, **setup), lambda: fp.Assessment.load(journal)):
            with pytest.raises(JournalError, match=rf"journal.jsonl, line {number}: not a record of a campaign"):
                use()
        assert journal.read_bytes() == b"".join(lines)

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            (("created",), 7, "created: expected a text"),
            (("fingerprint", "bits"), "many", "fingerprint, bits: expected a whole number"),
            (("fingerprint", "seed"), -1, "fingerprint, seed: expected a whole number from 0, got -1"),
            (("golden", "accuracy"), None, "golden, accuracy: expected a number"),
            (("golden_answers",), 3, "golden_answers: expected a text"),
            (("golden_intervals", "accuracy"), [0.5], "golden_intervals, accuracy: expected two numbers"),
            (("metrics", "accuracy", "range"), [0, "1"], "metrics, accuracy, range, high: expected a number"),
            (("decision", "assumed"), "no", "decision, assumed: expected true or false"),
            (("audit", "share"), "all", "audit, share: expected a number"),
            (("left_out",), [], "left_out: expected an object with named fields"),
            (("plan", "trials"), 0, "plan, trials: expected a whole number from 1"),
            (("versions", "torch"), 2, "versions, torch: expected a text"),
            (("points", 1, "coordinates", "count"), "30", r"points\[1\], coordinates, count: expected a number"),
            (("stored", 0, "bits"), 0.5, r"stored\[0\], bits: expected a whole number"),
        ],
    )
    def test_a_damaged_header_is_refused_with_its_field(self, mlp, setup, journal, field, value, said):
        fp.assess(mlp, **setup)
        first, rest = journal.read_text().split("\n", 1)
        header = inside = json.loads(first)
        *outer, last = field
        for name in outer:
            inside = inside[name]
        inside[last] = value
        journal.write_text(json.dumps(header) + "\n" + rest)
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line 1: not the header of a campaign .*{said}"):
            fp.Assessment.load(journal)

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            (("point",), 7, "point 7 of a sweep of"),
            (("point",), "x", "point: expected a whole number"),
            (("trial",), -1, "trial: expected a whole number"),
            (("faults",), None, "faults: expected a whole number"),
            (("flips",), 10**6, "flips: expected at most the"),
            (("samples",), 6, "samples: expected"),
            (("digest",), 7, "digest: expected a text"),
            (("audited",), "x", "audited: expected true or false"),
            (("error",), 7, "error: expected a text"),
            (("seconds",), [], "seconds: expected a number"),
            (("metrics", "accuracy"), "x", "metrics, accuracy: expected a number"),
            (("metrics", "other"), 0.5, "metrics: expected"),
            (("outcomes", "due"), -5, "outcomes, due: expected a whole number"),
            (("outcomes", "due"), 500, "sum of outcomes: expected"),
            (("outcomes", "other"), 0, "outcomes: expected"),
            (("coordinates", "count"), -5, "coordinates: expected"),
            (("coordinates", "count"), "x", "coordinates, count: expected a number"),
            (("extra",), 1, "extra"),
        ],
    )
    def test_an_edited_record_is_refused_with_its_field(self, mlp, setup, journal, field, value, said):
        fp.assess(mlp, **setup)
        lines = journal.read_text().splitlines(keepends=True)
        record = inside = json.loads(lines[1])
        *outer, last = field
        for name in outer:
            inside = inside[name]
        inside[last] = value
        lines[1] = json.dumps(record) + "\n"
        journal.write_text("".join(lines))
        for use in (lambda: fp.assess(mlp, **setup), lambda: fp.Assessment.load(journal)):
            with pytest.raises(JournalError, match=rf"journal\.jsonl, line 2: not a record of a campaign .*{said}"):
                use()
        assert journal.read_text() == "".join(lines)

    def test_a_damaged_plan_is_refused_with_its_line(self, mlp, setup, journal):
        fp.assess(mlp, **setup)
        with journal.open("a") as file:
            file.write('{"resumed": true, "plan": {"trials": 3, "margin": "small", "confidence": 0.95}}\n')
        with pytest.raises(JournalError, match=r"line 8: not a record of a campaign .*plan, margin: expected a number"):
            fp.Assessment.load(journal)

    def test_a_header_of_before_lacks_what_came_later(self, mlp, setup, journal):
        found = fp.assess(mlp, **setup)
        first, rest = journal.read_text().split("\n", 1)
        later = ("golden_answers", "golden_intervals", "metrics", "decision", "left_out_bits", "coverage", "audit")
        kept = {name: value for name, value in json.loads(first).items() if name not in later}
        journal.write_text(json.dumps(kept) + "\n" + rest)
        old = fp.Assessment.load(journal)
        assert old.records == found.records
        assert (old.header.decision, old.header.golden_answers, old.header.audit.share) == (None, None, 0.0)
        assert math.isnan(old.coverage)
        assert old.summary["accuracy"].tolist() == found.summary["accuracy"].tolist()

    @pytest.mark.parametrize(
        "content", [b"a,b\n1,2\n", b"{}\n", b"[]\n", b"\n", b"\x00\x01\x02", b"notes without an end", b'{"a": 1}']
    )
    def test_a_foreign_file_is_left_alone(self, mlp, setup, journal, content):
        journal.parent.mkdir()
        journal.write_bytes(content)
        with pytest.raises(JournalError, match="not a flipproof journal"):
            fp.assess(mlp, **setup)
        assert journal.read_bytes() == content

    def test_a_later_schema_is_refused(self, mlp, setup, journal):
        fp.assess(mlp, **setup)
        journal.write_bytes(journal.read_bytes().replace(b'"flipproof_journal":2', b'"flipproof_journal":3', 1))
        with pytest.raises(JournalError, match="has schema 3; this flipproof reads schemas 1 to 2"):
            fp.assess(mlp, **setup)

    def test_loading_what_is_not_there_or_empty(self, tmp_path):
        with pytest.raises(JournalError, match=r"cannot read .*none\.jsonl: No such file"):
            fp.Assessment.load(tmp_path / "none.jsonl")
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(JournalError, match="not a flipproof journal"):
            fp.Assessment.load(tmp_path / "empty.jsonl")


class TestUnwritable:
    def test_a_folder_as_the_file(self, mlp, setup, tmp_path):
        with pytest.raises(JournalError, match="is a folder"):
            fp.assess(mlp, **{**setup, "journal": tmp_path})

    def test_a_file_as_the_folder(self, mlp, setup, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(JournalError, match="cannot write"):
            fp.assess(mlp, **{**setup, "journal": tmp_path / "file" / "journal.jsonl"})
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="no folder here that even root cannot write")
    def test_a_folder_that_takes_no_files(self, mlp, setup):
        before = [p.detach().clone() for p in mlp.parameters()]
        with pytest.raises(JournalError, match=r"cannot write /sys/kernel/journal\.jsonl: Permission"):
            fp.assess(mlp, **{**setup, "journal": "/sys/kernel/journal.jsonl"})
        assert all(torch.equal(p, q) for p, q in zip(before, mlp.parameters(), strict=True))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write read-only files")
    def test_a_read_only_journal(self, mlp, setup, journal):
        fp.assess(mlp, **setup)
        journal.chmod(0o444)
        with pytest.raises(JournalError, match=r"cannot write .*Permission denied"):
            fp.assess(mlp, **{**setup, "trials": 9})

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, mlp, setup, tmp_path):
        journal = tmp_path / "journal.jsonl"
        journal.symlink_to("/dev/full")
        with pytest.raises(JournalError, match=r"No space left on device.*run the same call again to resume"):
            fp.assess(mlp, **{**setup, "journal": journal})


@dataclass(frozen=True)
class Sum:
    """The smallest work there is."""

    key: tuple[int]
    value: int

    def to_json(self) -> dict[str, Any]:
        return {"key": list(self.key), "value": self.value}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sum:
        return cls(tuple(record["key"]), record["value"])


@dataclass(frozen=True)
class About:
    what: str
    plan: str = ""

    @property
    def identity(self) -> tuple[dict[str, Any], ...]:
        return ({"what": self.what},)

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "plan": self.plan}

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> About:
        return cls(str(header["what"]), str(header["plan"]))


def test_two_writers_in_one_process(mlp, setup, journal):
    with (
        Journal(journal, About, Sum).writing(About("sums")),
        pytest.raises(JournalLocked, match="being written by another process"),
    ):
        fp.assess(mlp, **setup)
    journal.unlink()
    assert len(fp.assess(mlp, **setup).records) == 6  # the lock was given back


def test_any_work_has_a_journal_and_none_is_taken_for_another(mlp, setup, journal):
    sums = Journal(journal, About, Sum, kind="sum")
    with sums.writing(About("small numbers")) as known:
        assert known == []
        sums.append(Sum((1,), 7))
    with sums.writing(About("small numbers", plan="more")) as known:
        assert known == [Sum((1,), 7)]
    assert sums.read() == (About("small numbers", "more"), [Sum((1,), 7)])
    kept = journal.read_bytes()
    with (
        pytest.raises(JournalMismatch, match=r"what: 'small numbers' → 'large ones'"),
        sums.writing(About("large ones")),
    ):
        pass
    for use in (lambda: fp.assess(mlp, **setup), lambda: fp.Assessment.load(journal)):
        with pytest.raises(JournalError, match="is the journal of a sum, expected that of a campaign"):
            use()
    assert journal.read_bytes() == kept


def test_nothing_is_written_before_everything_is_checked(mlp, setup, journal):
    for change in ({"workers": 0}, {"trials": 0}, {"metrics": "none"}, {"data": []}, {"faults": fp.RandomBits(10**6)}):
        with pytest.raises(fp.FlipproofError):
            fp.assess(mlp, **{**setup, **change})
    assert not journal.exists()


def test_a_folder_that_takes_no_files_is_not_called_another_writer(mlp, blobs):
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder in which nothing can be made, whoever asks: /proc")
    with pytest.raises(fp.errors.JournalError, match="takes no new file") as error:
        fp.assess(mlp, data=blobs, faults=fp.RandomBits(1), trials=1, journal="/proc/journal.jsonl")
    assert not isinstance(error.value, fp.errors.JournalLocked)


def test_a_folder_is_no_journal(mlp, setup, tmp_path):
    for use in (lambda: fp.assess(mlp, **{**setup, "journal": tmp_path}), lambda: fp.Assessment.load(tmp_path)):
        with pytest.raises(JournalError, match=r"is a folder; a journal is a file, such as .*journal\.jsonl"):
            use()
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="is a file; explore takes journal= a folder"):
        fp.explore(mlp, setup["data"], accuracy=0.5, drop=0.5, trials=2, journal=tmp_path / "file")


def test_another_format_is_named(mlp, setup, journal):
    fp.assess(mlp, **setup)
    with pytest.raises(JournalMismatch, match=r"format: 'Float32\(\) .*' → 'Float16\(\)"):
        fp.assess(mlp, **setup, format=fp.Float16())
