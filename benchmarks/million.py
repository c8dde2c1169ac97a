"""What a million trials take: in the journal, in memory, to read and to sum up. Parts of the goals, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import flipproof as fp
from benchmarks.measure import Row, Size, memory_can_be_measured, one_thread
from flipproof.campaigns.answers import encode_answers
from flipproof.campaigns.assessment import campaign_journal
from flipproof.running.scales import OUTCOMES

SAMPLES = 100
BYTES, RESIDENT, SUMMED, READ = 50, 300 * 2**20, 2.0, 5.0
"""The goals for a million trials: bytes of one in the journal, bytes of the process, seconds of one core."""

_READ = """
import json, sys, time
import flipproof as fp

began = time.process_time()
found = fp.Assessment.load(sys.argv[1])
read = time.process_time() - began
began = time.process_time()
assert len(found.summary) == 2
summed = time.process_time() - began
status = open("/proc/self/status").read()  # its peak begins with this program, that of getrusage before
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(json.dumps({"read": read, "summed": summed, "peak": peak}))
"""


def run(size: Size) -> list[Row]:
    """Trials of one and two faults, of which four in ten change some answers; read by a fresh process."""
    if not memory_can_be_measured():
        return [Row("a million trials", None, note="needs Linux, which says how much memory a process took")]
    count = size.choose(1_000_000, 100_000, 2_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        _write(path, count)
        stored = path.stat().st_size / count
        command = [sys.executable, "-W", "ignore", "-c", _READ, str(path)]  # this module imports torch
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    what = f"{count:,} trials of {SAMPLES} samples: "
    return [
        Row(f"{what}bytes of one in the journal ÷ {BYTES}", stored / BYTES, at_most=1.0),
        Row(f"{what}peak memory of who reads and sums up ÷ 300 MiB", found["peak"] / RESIDENT, at_most=1.0),
        Row(f"{what}time to read (CPU) ÷ {READ:g} s", found["read"] / READ, at_most=1.0),
        Row(f"{what}time to sum up (CPU) ÷ {SUMMED:g} s", found["summed"] / SUMMED, at_most=1.0),
    ]


def _write(path: Path, count: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10)).eval()
    images = torch.randn(SAMPLES, 64)
    with torch.no_grad(), one_thread():
        data = [(images, net(images).argmax(dim=1))]
        base = fp.assess(net, data, faults=fp.RandomBits([1, 2]), trials=20, progress=False)
    header = replace(base.header, plan=replace(base.header.plan, trials=count // 2))
    like, generator = list(base.records), np.random.default_rng(0)
    journal = campaign_journal(path)
    with journal.writing(header):
        for index in range(count):
            point, trial = divmod(index, count // 2)
            changed = (generator.random(SAMPLES) < 0.1) & (generator.random() < 0.4)
            ended = np.where(changed, generator.integers(1, 3, SAMPLES), 0)
            place = ("0.weight", int(generator.integers(6400)), int(generator.integers(32)))
            counts = np.bincount(ended, minlength=len(OUTCOMES)).tolist()
            found = replace(
                like[20 * point + int(generator.integers(20))],
                trial=trial,
                digest=f"{int(generator.integers(2**63)):016x}",
                seconds=float(f"{generator.exponential(1e-3):.3g}"),
                metrics={"accuracy": float((ended != 2).mean())},
                outcomes=dict(zip(OUTCOMES, counts, strict=True)),
                answers=encode_answers(ended, ended != 2),
                where=[place] * (point + 1),
            )
            journal.append(found)
