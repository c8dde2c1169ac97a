"""A reader of a user's own MIMIC-III benchmark folder, decompensation task (Harutyunyan et al. 2019).

MIMIC-III is credentialed: nothing of it is shipped with this project, downloaded by it or kept anywhere by it.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from flipproof.datasets.timelines import CHANNELS, INDEX, LABELS_FROM, EHRData, Problems, Stay, read_value, timeline
from flipproof.errors import DataError

Labels = dict[str, dict[int, float]]
"""Record → hour → label."""


def mimic3(path: str | os.PathLike[str], *, longest: int = 400) -> EHRData:
    """The decompensation task of the public MIMIC-III benchmark, from a folder that its scripts made.

    The folder holds ``train/`` and ``test/`` with ``{subject}_episode{N}_timeseries.csv`` (a column ``Hours`` and 17
    channels, blanks where nothing was measured) and ``train_listfile.csv``, ``val_listfile.csv`` and
    ``test_listfile.csv`` (``stay,period_length,y_true``); validation stays lie in ``train/``. The label of a period of
    t hours (t > 4) is that of the hour [t − 1, t): 1 if the patient dies within 24 hours.

    Args:
        path: the folder.
        longest: hours of a stay that are used.

    Raises:
        DataError: if a listfile is missing or no labelled stay is left. What is wrong with single rows and files is
            counted in `.problems` and left out.

    Example:
        ``data = mimic3("~/mimic3-benchmarks/data/decompensation")``
    """
    folder = Path(path).expanduser()
    problems = Problems()
    parts: list[list[Stay]] = []
    for listfile, place in (("train", "train"), ("val", "train"), ("test", "test")):
        labels = _labels(folder / f"{listfile}_listfile.csv", problems)
        stays = (_stay(folder / place / name, hours, longest, problems) for name, hours in labels.items())
        parts.append([stay for stay in stays if stay is not None])
    train, validation, test = parts
    return EHRData.standardised(train, validation, test, problems)


def _labels(path: Path, problems: Problems) -> Labels:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; expected the folder of the MIMIC-III benchmark's decompensation task, with "
            f"train/, test/ and {{train,val,test}}_listfile.csv"
        )
    labels: Labels = defaultdict(dict)
    with path.open(newline="") as file:
        rows = csv.reader(file)
        if (header := next(rows, None)) != ["stay", "period_length", "y_true"]:
            raise DataError(f"{path}: expected the columns stay,period_length,y_true, got {header}")
        for number, row in enumerate(rows, start=2):
            where = f"{path.name}:{number}"
            try:
                name, period, label = row
                hour, y = float(period), float(label)
            except ValueError:
                problems.note("listfile: malformed row", f"{where} {','.join(row)!r}")
                continue
            if not (hour > LABELS_FROM and hour == int(hour)):
                problems.note("listfile: period that is no whole number of hours above 4", f"{where} {period}")
            elif y not in (0.0, 1.0):
                problems.note("listfile: label other than 0 and 1", f"{where} {label}")
            elif Path(name).name != name:
                problems.note("listfile: a stay that is no plain file name", f"{where} {name!r}")
            else:
                labels[name][int(hour)] = y
    return labels


def _stay(path: Path, labels: dict[int, float], longest: int, problems: Problems) -> Stay | None:
    length = min(max(labels), longest)
    if not path.is_file():
        problems.note("stay without a file", path.name)
        return None
    hours, channels, values = [], [], []
    with path.open(newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "Hours" not in header:
            problems.note("stay without a column Hours", path.name)
            return None
        for missing in [channel.name for channel in CHANNELS if channel.name not in header]:
            problems.note(f"missing column {missing}", path.name)
        for unknown in [name for name in header if name != "Hours" and name not in INDEX]:
            problems.note(f"unknown column {unknown!r}", path.name)
        time = header.index("Hours")
        for number, row in enumerate(rows, start=2):
            where = f"{path.name}:{number}"
            if len(row) != len(header):
                problems.note("row with another number of fields than the header", where)
                continue
            try:
                hour = float(row[time])
            except ValueError:
                problems.note("Hours is no number", f"{where} {row[time]!r}")
                continue
            if not 0 <= hour < float("inf"):
                problems.note(
                    "hours below 0, before admission" if hour < 0 else "Hours is not finite", f"{where} {hour}"
                )
                continue
            for name, text in zip(header, row, strict=True):
                if text and name in INDEX:
                    value = read_value(CHANNELS[INDEX[name]], text, where, problems)
                    if value is not None:
                        hours.append(hour)
                        channels.append(INDEX[name])
                        values.append(value)
    if not hours:
        problems.note("stay without a measurement", path.name)
        return None
    marks = np.full(length, np.nan)
    for hour, y in labels.items():
        if hour <= length:
            marks[hour - 1] = y
    if np.isnan(marks).all():
        problems.note(f"stay without a label in its first {longest} hours", path.name)
        return None
    x = timeline(np.array(hours), np.array(channels, np.int64), np.array(values), length)
    return Stay(path.name, x, marks)
