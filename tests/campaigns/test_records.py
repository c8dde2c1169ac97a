"""Trials by columns: what comes out is what went in, in memory and in the journal, and little room is taken."""

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flipproof as fp
from flipproof.campaigns import assessment
from flipproof.campaigns import records as records_module
from flipproof.campaigns.answers import Crossed, decode_answers, encode_answers, holds
from flipproof.campaigns.assessment import campaign_journal
from flipproof.campaigns.record import Trial
from flipproof.campaigns.records import CHUNK, Records
from flipproof.errors import ConfigError, JournalError
from flipproof.running.scales import OUTCOMES

SAMPLES = 20


@pytest.fixture(scope="module")
def base():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        data = [(torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % 3)]
        return fp.assess(net, data, faults=fp.RandomBits([1, 30]), trials=4)


def drawn(base, count, seed=0):
    """Trials that differ in all that may differ."""
    generator = np.random.default_rng(seed)
    golden = base.records.golden
    for index in range(count):
        kind = generator.integers(4)
        outcomes = generator.integers(0, 4, SAMPLES) * (generator.random(SAMPLES) < (0.0, 0.2, 1.0, 0.5)[kind])
        correct = np.where(outcomes == 0, golden, generator.random(SAMPLES) < 0.5)
        counts = np.bincount(outcomes, minlength=4).tolist()
        faults = int(generator.integers(0, 2**40)) if kind == 3 else int(generator.integers(0, 17))
        words = {name: int(generator.integers(0, 9)) for name in ("corrected", "detected", "miscorrected")}
        yield Trial(
            point=index % 2,
            trial=index // 2,
            coordinates={"count": (1, 30)[index % 2]},
            faults=faults,
            flips=int(generator.integers(0, faults + 1)),
            digest=f"{int(generator.integers(2**63)):016x}",
            metrics={"accuracy": float(generator.choice([0.5, np.nan, np.inf, 1 / 3]))},
            outcomes=dict(zip(OUTCOMES, counts, strict=True)),
            samples=SAMPLES,
            seconds=float(f"{generator.exponential(10.0 ** generator.integers(-6, 4)):.3g}"),
            versions={"flipproof": "0.1.0", "torch": ("2.9", "3.0")[kind % 2]},
            where=[("a.weight", int(generator.integers(2**40)), int(generator.integers(64)))] * min(faults, 16),
            error=None if kind else "RuntimeError: \u00fcber",
            answers=None if kind == 2 and seed % 2 else encode_answers(outcomes, correct),
            layer=None if index % 3 else "a",
            audited=bool(generator.integers(2)),
            words=None if kind == 1 else words,
        )


def same(one: Trial, other: Trial) -> bool:
    return json.dumps(one.to_json()) == json.dumps(other.to_json())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 7, 300])
def test_trials_come_back_from_memory_and_from_lines(base, count, seed):
    trials = list(drawn(base, count, seed))
    records = Records(base.header, trials)
    again = Records(base.header)
    for start in range(0, count, 50):
        again.unpack(json.loads(json.dumps(records.pack(trials[start : start + 50]))))
    for found in (records, again, records[:], again.select(np.arange(count))):
        assert len(found) == count
        assert all(same(one, other) for one, other in zip(found, trials, strict=True))
    assert same(records[-1], trials[-1])
    order = np.random.default_rng(seed).permutation(count)
    assert all(same(one, trials[i]) for one, i in zip(again.select(order), order, strict=True))
    assert records.column("flips").tolist() == [trial.flips for trial in trials]
    assert records.texts("layer") == [trial.layer for trial in trials]
    assert records.texts("error") == [trial.error for trial in trials]


def test_many_trials_come_back_in_chunks(base):
    trials = list(drawn(base, 3 * CHUNK + 5))
    records = Records(base.header, trials)
    assert all(same(one, other) for one, other in zip(records, trials, strict=True))
    rows = np.random.default_rng(0).integers(0, len(trials), 400)
    assert all(same(one, trials[i]) for one, i in zip(records.select(rows), rows, strict=True))


def test_answers_of_many_samples_are_packed_a_few_at_a_time(base, monkeypatch, tmp_path):
    monkeypatch.setattr(records_module, "BLOCK_BYTES", 3 * SAMPLES + 1)
    trials = list(drawn(base, 20))
    assert Records(base.header).most == 3
    records = Records(base.header, trials)
    assert all(same(one, other) for one, other in zip(records, trials, strict=True))
    assert max(len(codes) for codes in records.codes()) == 3
    with pytest.raises(ConfigError, match="at most 3 trials"):
        Records(base.header).unpack(Records(base.header).pack(trials[:4]))
    header = replace(base.header, plan=replace(base.header.plan, trials=10))
    journal = campaign_journal(tmp_path / "journal.jsonl")
    with journal.writing(header):
        for trial in trials:
            journal.append(trial)
    assert len(fp.Assessment.load(tmp_path / "journal.jsonl").records) == 20


def test_counts_are_those_of_a_table(base):
    records = Records(base.header, drawn(base, 500)).select(np.arange(3, 400, 2))
    golden = records.golden
    table = np.stack([decode_answers(trial.answers, golden) for trial in records])
    assert (np.concatenate([*records.codes()]) == table).all()
    point = fp.Assessment(base.header, records).point(1)
    assert len(point.records) == len(records)
    for name in (*OUTCOMES, "critical_total", "correct"):
        ours, theirs = point.table(name), Crossed.of(holds(table, name)[None][0])
        assert (ours.plus == theirs.plus).all()
        assert (ours.minus == theirs.minus).all()
        assert (ours.sums == theirs.sums).all()
    lost = Crossed.of(golden.astype(np.int8) - holds(table, "correct"))
    ours = point.lost()
    assert (ours.plus == lost.plus).all()
    assert (ours.minus == lost.minus).all()
    assert (ours.sums == lost.sums).all()


def test_a_tally_counts_what_came_later_too(base):
    first, *rest = drawn(base, 9)
    records = Records(base.header, [first])
    assert len(records.tally.right) == 1
    for trial in rest:
        records.append(trial)
    assert len(records.tally.right) == 9
    records.clear()
    assert len(records) == 0
    assert list(records) == []


def changed(line, **columns):
    """The packed line with other columns."""
    content, parts, start = zlib.decompress(base64.b64decode(line["data"])), [], 0
    for name, kind in line["columns"]:
        size = line["named"] if name in ("site", "value", "bit") else line["packed"]
        part = np.frombuffer(content, kind, size, start)
        start += part.nbytes
        parts.append(np.asarray(columns.get(name, part), np.dtype(kind)).tobytes())
    return sealed(line | {"data": base64.b64encode(zlib.compress(b"".join(parts))).decode()})


def sealed(line):
    """With the checksum that belongs to it."""
    rest = {name: value for name, value in line.items() if name != "crc"}
    return rest | {"crc": zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"point": [2] * 9}, "point"),
        ({"masked": [21] * 9}, "masked"),
        ({"due": [1] * 9}, "sum of outcomes"),
        ({"flips": [127] * 9}, "flips"),
        ({"seconds": [-1.0] * 9}, "seconds"),
        ({"noted": [3] * 9}, "noted"),
        ({"noted": [1] * 9}, "answers"),
        ({"error": [9] * 9}, "error"),
        ({"named": [200] * 9}, "named"),
        ({"versions": [100] * 9}, "versions"),
    ],
)
def test_lines_that_contradict_their_header_or_themselves_are_refused(base, change, said):
    trials = [replace(trial, faults=100, flips=3, where=[]) for trial in drawn(base, 9, 4)]
    line = Records(base.header).pack(trials)
    Records(base.header).unpack(changed(line))
    with pytest.raises(ConfigError, match=said):
        Records(base.header).unpack(changed(line, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"packed": 8},
        {"packed": 10**12},
        {"packed": 0},
        {"named": 10**9},
        {"texts": [1]},
        {"columns": []},
        {"columns": [["point", "object"]]},
        {"data": "AAAA"},
        {"data": base64.b64encode(zlib.compress(bytes(10**7))).decode()},
        {"answers": "AAAA"},
        {"answers": base64.b64encode(zlib.compress(bytes(10**7))).decode()},
        {"more": 1},
    ],
)
def test_damaged_lines_are_refused_with_their_number(base, change, tmp_path):
    path = tmp_path / "journal.jsonl"
    line = Records(base.header).pack(list(drawn(base, 9)))
    with campaign_journal(path).writing(base.header):
        pass
    whole = path.read_text()
    path.write_text(whole + json.dumps(line) + "\n")
    assert len(fp.Assessment.load(path).records) == 8  # 4 trials at each of two points are planned
    for damaged in (sealed(line | change), line | change):
        path.write_text(whole + json.dumps(damaged) + "\n")
        with pytest.raises(JournalError, match="line 2: not a record of a campaign"):
            fp.Assessment.load(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_line_with_any_byte_changed_is_refused(base, data):
    line = json.dumps(Records(base.header).pack(list(drawn(base, 5)))).encode()
    at = data.draw(st.integers(0, len(line) - 1))
    other = line[:at] + bytes([data.draw(st.integers(0, 255))]) + line[at + 1 :]
    try:
        found = json.loads(other)
    except ValueError:
        return
    if found != json.loads(line):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            Records(base.header).unpack(found)


def test_a_trial_takes_fifty_bytes_in_a_journal(base, tmp_path):
    path, count = tmp_path / "journal.jsonl", 20_000
    header = replace(base.header, plan=replace(base.header.plan, trials=count))
    with campaign_journal(path).writing(header):
        pass
    journal = campaign_journal(path)
    generator = np.random.default_rng(0)
    with journal.writing(header):
        for index in range(count):
            like = base.records[int(generator.integers(4))]
            digest = f"{int(generator.integers(2**63)):016x}"
            place = [("2.weight", int(generator.integers(10**6)), int(generator.integers(32)))]
            seconds = float(f"{generator.exponential(0.01):.3g}")
            journal.append(replace(like, trial=index, digest=digest, where=place, seconds=seconds))
    assert path.stat().st_size < 50 * count
    assert len(fp.Assessment.load(path).records) == count


def test_tables_are_written_in_parts_as_they_are_made_in_one(base, tmp_path, monkeypatch):
    trials = sorted(drawn(base, 70, 3), key=lambda trial: (trial.point, trial.trial))
    result = fp.Assessment(base.header, trials)
    rows = pd.DataFrame([trial.row() for trial in trials])
    pd.testing.assert_frame_equal(result.trials, rows, check_dtype=False)
    whole = {end: getattr(result, f"to_{end}")(tmp_path / f"whole.{end}") for end in ("csv", "parquet")}
    monkeypatch.setattr(assessment, "_ROWS", 16)
    for end in ("csv.gz", "csv.zip", "csv.bz2"):
        pd.testing.assert_frame_equal(pd.read_csv(result.to_csv(tmp_path / f"t.{end}")), pd.read_csv(whole["csv"]))
    for end, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        part = getattr(result, f"to_{end}")(tmp_path / f"parts.{end}")
        pd.testing.assert_frame_equal(read(part), read(whole[end]))
        assert len(read(part)) == 70


def test_the_reader_of_the_documentation_reads_a_journal(base, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "journal.md").read_text(encoding="utf-8")
    namespace = {}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    path, header = tmp_path / "journal.jsonl", replace(base.header, plan=replace(base.header.plan, trials=50))
    trials = list(drawn(base, 100))
    journal = campaign_journal(path)
    with journal.writing(header):
        for trial in trials:
            journal.append(trial)
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    alone = [line for line in lines if "packed" not in line]
    found = [int(number) for part in namespace["columns"](path) for number in part["flips"]]
    assert sorted([*found, *(line["flips"] for line in alone)]) == sorted(trial.flips for trial in trials)
    assert len(found) > 90


DAMAGE = [
    {"digest": "zz"},
    {"digest": ""},
    {"digest": "0" * 40},
    {"digest": "-5"},
    {"where": [["a", 10**30, 0]]},
    {"where": [["a", float("inf"), 0]]},
    {"where": [["a", -5, 0]]},
    {"where": [["a", 1, 99]]},
    {"where": [["a", 1]]},
    {"where": [[1, 1, 1]]},
    {"where": [["a", 1, 1]] * 17},
    {"where": 3},
    {"seconds": -1},
    {"seconds": float("nan")},
    {"seconds": 1e300},
    {"answers": base64.b64encode(zlib.compress(b"\xff" * SAMPLES)).decode()},
    {"answers": "!!!!"},
    {"answers": encode_answers([2] * SAMPLES, [False] * SAMPLES)},
]


@pytest.mark.parametrize("change", DAMAGE, ids=str)
def test_a_single_line_that_no_trial_leaves_is_refused_with_its_number(base, change, tmp_path):
    path = tmp_path / "journal.jsonl"
    with campaign_journal(path).writing(base.header):
        pass
    good = json.dumps(base.records[0].to_json()) + "\n"
    whole = path.read_text() + good + json.dumps(base.records[1].to_json() | change) + "\n"
    path.write_text(whole)
    with pytest.raises(JournalError, match="line 3: not a record of a campaign"):
        fp.Assessment.load(path)
    assert path.read_text() == whole


@pytest.mark.parametrize(
    "line",
    [
        "[" * 200_000,
        '{"resumed": true, "golden": {"x": 1}}',
        '{"resumed": true, "plan": {"trials": 4, "margin": null, "confidence": 7}}',
        '{"resumed": true, "points": []}',
    ],
)
def test_other_lines_that_nobody_writes_are_refused_with_their_number(base, line, tmp_path):
    path = tmp_path / "journal.jsonl"
    with campaign_journal(path).writing(base.header):
        pass
    path.write_text(path.read_text() + json.dumps(base.records[0].to_json()) + "\n" + line + "\n")
    with pytest.raises(JournalError, match="line 3: not a record of a campaign"):
        fp.Assessment.load(path)
    path.write_text(line + "\n")
    with pytest.raises(JournalError):
        fp.Assessment.load(path)


def test_a_selection_stays_what_it_is_when_more_trials_come(base):
    records = Records(base.header, drawn(base, 5))
    some, none = records[1:3], records.select(np.arange(0))
    for trial in drawn(base, 9):
        records.append(trial)
    assert len(some.column("trial")) == 2
    assert len(none.column("trial")) == 0
    assert len(records) == len(list(records)) == 14
    with pytest.raises(TypeError, match="a selection"):
        some.append(records[0])
