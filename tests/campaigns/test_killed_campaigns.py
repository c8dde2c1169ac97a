"""Real processes, really killed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zygote
from zygote import campaign

import flipproof as fp
from flipproof.errors import InfrastructureError, JournalLocked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")

PATIENCE = 20.0


class Campaigns:
    """Starts campaigns in processes of their own and tells how they ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, zygote.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: queue.Queue[str] = queue.Queue()
        self._started: list[int] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=lambda s=stream, t=take: [t(line) for line in s], daemon=True)
            for stream, take in ((self._process.stdout, self._said.put), (self._process.stderr, self.errors.append))
        ]
        for reader in self._readers:
            reader.start()

    def start(self, journal: Path, **wanted: object) -> int:
        print(json.dumps({"journal": str(journal), **wanted}), file=self._process.stdin, flush=True)
        pid = int(self._said.get(timeout=60))
        self._started.append(pid)
        return pid

    def exit_status(self, pid: int) -> int:
        said, status = self._said.get(timeout=60).split()
        assert int(said) == pid
        return int(status)

    def close(self) -> None:
        for pid in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE)
        for reader, stream in zip(self._readers, (self._process.stdout, self._process.stderr), strict=True):
            reader.join(timeout=PATIENCE)
            stream.close()


@pytest.fixture(scope="module")
def campaigns() -> Iterator[Campaigns]:
    running = Campaigns()
    yield running
    running.close()


@pytest.fixture(scope="module")
def uninterrupted() -> list:
    return records_of(campaign(None))


def records_of(result: fp.Assessment) -> list:
    return [replace(record, seconds=0.0) for record in result.records]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def group(leader: int) -> list[int]:
    """Processes of a group that are alive, zombies not counted."""
    members = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == leader and state != "Z":
                members.append(int(entry.name))
    return sorted(members)


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_dash_nine_at_any_moment_loses_at_most_what_was_under_way(campaigns, uninterrupted, tmp_path, workers):
    journal = tmp_path / "journal.jsonl"
    moments = random.Random(workers)
    for kills in range(1, 5):
        before = lines(journal)
        pid = campaigns.start(journal, workers=workers, sleep=0.01)
        enough = max(before, 1) + moments.randrange(4)
        assert eventually(lambda enough=enough: lines(journal) >= enough)
        time.sleep(moments.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        assert campaigns.exit_status(pid) == -signal.SIGKILL
        kept = fp.Assessment.load(journal).records
        assert len(kept) == lines(journal) - 1
        assert [replace(r, seconds=0.0) for r in kept] == [r for r in uninterrupted if (r.point, r.trial) in ids(kept)]
        if workers == 1:  # nothing that ended before the trial under way is missing
            assert [(r.point, r.trial) for r in kept] == [(r.point, r.trial) for r in uninterrupted[: len(kept)]]
        assert kills < 4 or 0 < len(kept) < 40
    kept = fp.Assessment.load(journal).records
    resumed = campaign(str(journal))  # at once: workers of the killed campaign may still hold the lock for a moment
    assert records_of(resumed) == uninterrupted
    assert [r for r in resumed.records if (r.point, r.trial) in ids(kept)] == list(kept)  # not run again
    assert eventually(lambda: group(pid) == [])


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_dash_nine_loses_at_most_what_waited_to_be_written(campaigns, uninterrupted, tmp_path, workers):
    journal = tmp_path / "journal.jsonl"
    for _ in range(3):
        before = lines(journal)
        pid = campaigns.start(journal, workers=workers, sleep=0.01, every=0.06)
        assert eventually(lambda before=before: lines(journal) >= max(before, 1) + 2)
        os.kill(pid, signal.SIGKILL)
        assert campaigns.exit_status(pid) == -signal.SIGKILL
        kept = fp.Assessment.load(journal).records
        assert [replace(r, seconds=0.0) for r in kept] == [r for r in uninterrupted if (r.point, r.trial) in ids(kept)]
    packed = [json.loads(line).get("packed", 1) for line in journal.read_bytes().splitlines()[1:]]
    assert max(packed) > 1
    assert sum(packed) == len(kept)
    resumed = campaign(str(journal))
    assert records_of(resumed) == uninterrupted
    assert [r for r in resumed.records if (r.point, r.trial) in ids(kept)] == list(kept)


def ids(records) -> set[tuple[int, int]]:
    return {(record.point, record.trial) for record in records}


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_a_resumable_journal_and_no_orphans(campaigns, uninterrupted, tmp_path, workers):
    journal = tmp_path / "journal.jsonl"
    pid = campaigns.start(journal, workers=workers, sleep=0.02)
    assert eventually(lambda: lines(journal) >= 5)
    assert len(group(pid)) == (1 if workers == 1 else 3)
    os.killpg(pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
    assert campaigns.exit_status(pid) == 130
    assert group(pid) == []
    kept = fp.Assessment.load(journal).records
    assert 4 <= len(kept) < 40
    assert records_of(campaign(str(journal))) == uninterrupted


def test_ctrl_c_writes_what_waits(campaigns, uninterrupted, tmp_path):
    journal = tmp_path / "journal.jsonl"
    pid = campaigns.start(journal, sleep=0.02, every=60.0)
    assert eventually(lambda: lines(journal) >= 2)
    time.sleep(0.2)
    assert lines(journal) == 2
    os.killpg(pid, signal.SIGINT)
    assert campaigns.exit_status(pid) == 130
    assert lines(journal) == 3
    assert len(fp.Assessment.load(journal).records) > 2
    assert records_of(campaign(str(journal))) == uninterrupted


def test_a_killed_worker_is_replaced_and_its_trials_are_done_again(campaigns, uninterrupted, tmp_path):
    journal = tmp_path / "journal.jsonl"
    pid = campaigns.start(journal, workers=2, sleep=0.02)
    for reached in (4, 15):
        assert eventually(lambda enough=reached: lines(journal) >= enough and len(group(pid)) == 3)
        os.kill(random.Random(reached).choice([member for member in group(pid) if member != pid]), signal.SIGKILL)
        assert eventually(lambda enough=reached: lines(journal) > enough + 5)
    assert campaigns.exit_status(pid) == 0
    result = fp.Assessment.load(journal)
    assert lines(journal) == 41  # every trial once
    assert records_of(result) == uninterrupted


def test_a_worker_that_always_dies_ends_the_campaign_and_keeps_what_was_done(tmp_path):
    parent = os.getpid()

    def deadly(outputs, targets):
        if os.getpid() != parent and not calls.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5

    calls = tmp_path / "calls"
    journal = tmp_path / "journal.jsonl"
    setup = {"data": zygote.samples(), "metrics": deadly, "journal": journal, "trials": 4, **zygote.SETUP}
    model = zygote.network()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InfrastructureError, match=r"died 3 times around point 0, trial .*fewer workers to resume"):
        fp.assess(model, workers=2, **setup)
    assert all((p == q).all() for p, q in zip(before, model.parameters(), strict=True))
    assert fp.Assessment.load(journal).records == []
    calls.touch()
    assert len(fp.assess(model, workers=2, **setup).records) == 8


def test_two_processes_do_not_write_one_journal(campaigns, uninterrupted, tmp_path):
    journal = tmp_path / "journal.jsonl"
    pid = campaigns.start(journal, sleep=0.1)
    assert eventually(lambda: lines(journal) >= 2)
    with pytest.raises(JournalLocked, match=r"journal\.jsonl is being written by another process"):
        campaign(str(journal))
    os.kill(pid, signal.SIGKILL)
    assert campaigns.exit_status(pid) == -signal.SIGKILL
    assert records_of(campaign(str(journal))) == uninterrupted


def test_a_disk_that_fills_up_in_the_middle_of_a_line(campaigns, uninterrupted, tmp_path):
    journal = tmp_path / "journal.jsonl"
    pid = campaigns.start(journal, limit=5_000)
    assert campaigns.exit_status(pid) == 3
    content = journal.read_bytes()
    assert content.endswith(b"\n")  # what was left of the line that did not fit is cut off
    kept = fp.Assessment.load(journal).records
    assert 0 < len(kept) < 40
    assert eventually(lambda: any("JournalError: cannot write" in line for line in campaigns.errors))
    assert any("Every finished job up to here is kept" in line for line in campaigns.errors)
    assert records_of(campaign(str(journal))) == uninterrupted
    assert journal.read_bytes().startswith(content)
