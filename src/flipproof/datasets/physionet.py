"""A reader of the PhysioNet/CinC Challenge 2012 records, in the layout of the MIMIC-III benchmark."""

from __future__ import annotations

import csv
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flipproof.datasets.timelines import CHANNELS, INDEX, EHRData, Problems, Stay, read_value, timeline
from flipproof.errors import DataError

HOURS = 48

LARGEST_RECORD = 2**20
"""Bytes of one patient's record; those of the challenge have some ten thousand."""

PARAMETERS = {
    "DiasABP": "Diastolic blood pressure",
    "NIDiasABP": "Diastolic blood pressure",
    "FiO2": "Fraction inspired oxygen",
    "GCS": "Glascow coma scale total",
    "Glucose": "Glucose",
    "HR": "Heart Rate",
    "Height": "Height",
    "MAP": "Mean blood pressure",
    "NIMAP": "Mean blood pressure",
    "SaO2": "Oxygen saturation",
    "RespRate": "Respiratory rate",
    "SysABP": "Systolic blood pressure",
    "NISysABP": "Systolic blood pressure",
    "Temp": "Temperature",
    "Weight": "Weight",
    "pH": "pH",
}
"""The challenge's parameters that are channels; capillary refill and the three parts of the coma scale are not recorded
there and stay unmeasured."""

OTHERS = {
    *("Albumin", "ALP", "ALT", "AST", "Bilirubin", "BUN", "Cholesterol", "Creatinine", "HCO3", "HCT", "K", "Lactate"),
    *("Mg", "MechVent", "Na", "PaCO2", "PaO2", "Platelets", "TroponinI", "TroponinT", "Urine", "WBC"),
    *("Age", "Gender", "ICUType", "RecordID"),
}
"""Parameters that belong to no channel and are left aside."""


def physionet2012(path: str | os.PathLike[str], *, stays: int | None = None) -> EHRData:
    """Intensive-care stays of 48 hours with the outcome in-hospital death, open to everybody.

    The label (1 for death in hospital) stands at the last hour: one prediction a stay, from all 48 hours. Every fifth
    record of set A is validation, the others training; set B is the test set.

    Args:
        path: a folder with ``Outcomes-a.txt``, ``Outcomes-b.txt`` and the records, as ``set-a/`` and ``set-b/`` or in
            ``physionet2012_ab.tar.xz`` (or ``set-a.tar.gz``, ``set-b.tar.gz`` as PhysioNet gives them).
        stays: read only so many records of each set.

    Raises:
        DataError: if files are missing. What is wrong with single rows and records is counted in `.problems`.

    Example:
        ``data = physionet2012("~/physionet2012", stays=1000)``
    """
    folder = Path(path).expanduser()
    problems = Problems()
    parts: dict[str, list[Stay]] = {}
    for letter in "ab":
        outcomes = _outcomes(folder / f"Outcomes-{letter}.txt", problems)
        found: list[Stay] = []
        for name, lines in _records(folder, f"set-{letter}"):
            if stays is not None and len(found) == stays:
                break
            stay = _stay(name, lines, outcomes, problems)
            if stay is not None:
                found.append(stay)
        parts[letter] = found
    validation = parts["a"][4::5]
    train = [stay for i, stay in enumerate(parts["a"]) if i % 5 != 4]
    return EHRData.standardised(train, validation, parts["b"], problems)


def _outcomes(path: Path, problems: Problems) -> dict[str, float]:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; get the challenge's files from https://physionet.org/content/challenge-2012 and "
            f"pass their folder"
        )
    outcomes = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if not {"RecordID", "In-hospital_death"} <= set(rows.fieldnames or ()):
            raise DataError(f"{path}: expected the columns RecordID and In-hospital_death, got {rows.fieldnames}")
        for number, row in enumerate(rows, start=2):
            if row["In-hospital_death"] not in ("0", "1"):
                problems.note("outcome other than 0 and 1", f"{path.name}:{number} {row['In-hospital_death']!r}")
            else:
                outcomes[row["RecordID"]] = float(row["In-hospital_death"])
    return outcomes


def _records(folder: Path, name: str) -> Iterator[tuple[str, Iterable[str]]]:
    """(record, lines) in the order of record numbers."""
    if (folder / name).is_dir():
        for file in sorted((folder / name).glob("*.txt")):
            yield file.stem, file.read_text(errors="replace").splitlines()
        return
    for archive in (f"{name}.tar.gz", "physionet2012_ab.tar.xz"):
        if (folder / archive).is_file():
            try:
                yield from _inside(folder / archive, name)
            except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise DataError(f"cannot read {folder / archive}: {error}") from error
            return
    raise DataError(f"{folder} holds neither {name}/ nor {name}.tar.gz nor physionet2012_ab.tar.xz")


def _inside(archive: Path, folder: str) -> Iterator[tuple[str, Iterable[str]]]:
    """The records of a folder in an archive, which is read in place: nothing is unpacked."""
    with tarfile.open(archive) as tar:
        inside = [m for m in tar if m.isfile() and m.name.endswith(".txt") and Path(m.name).parent.name == folder]
        for member in sorted(inside, key=lambda m: m.offset):
            if member.size > LARGEST_RECORD:  # a few bytes of an archive can claim any size
                raise DataError(
                    f"{archive}: {member.name} says it has {member.size:,} bytes; a record has thousands, and at most "
                    f"{LARGEST_RECORD:,} are read"
                )
            content = tar.extractfile(member)
            assert content is not None
            yield Path(member.name).stem, content.read().decode(errors="replace").splitlines()


def _stay(name: str, lines: Iterable[str], outcomes: dict[str, float], problems: Problems) -> Stay | None:
    if name not in outcomes:
        problems.note("record without an outcome", name)
        return None
    rows = iter(lines)
    if (header := next(rows, "").strip()) != "Time,Parameter,Value":
        problems.note("record without the header Time,Parameter,Value", f"{name} {header!r}")
        return None
    hours, channels, values = [], [], []
    for number, line in enumerate(rows, start=2):
        where = f"{name}:{number}"
        fields = line.strip().split(",")
        clock = fields[0].split(":")
        if len(fields) != 3 or len(clock) != 2 or not all(part.isdigit() for part in clock):
            problems.note("malformed row", f"{where} {line.strip()!r}")
            continue
        parameter, text = fields[1], fields[2]
        if parameter not in PARAMETERS:
            if parameter not in OTHERS:
                problems.note(f"unknown parameter {parameter!r}", where)
            continue
        if text == "-1" and parameter in ("Height", "Weight"):
            continue  # how the header rows say "not recorded"
        index = INDEX[PARAMETERS[parameter]]
        value = read_value(CHANNELS[index], text, where, problems)
        if value is not None:
            hours.append(int(clock[0]) + int(clock[1]) / 60)
            channels.append(index)
            values.append(value)
    if not hours:
        problems.note("record without a measurement", name)
        return None
    labels = np.full(HOURS, np.nan)
    labels[-1] = outcomes[name]
    return Stay(name, timeline(np.array(hours), np.array(channels, np.int64), np.array(values), HOURS), labels)
