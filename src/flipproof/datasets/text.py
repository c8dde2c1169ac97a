"""Sentences with a sentiment (SST-2) as numbered words."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from flipproof.errors import DataError

PADDING, UNKNOWN = 0, 1


def sst2(
    root: str | Path, *, words: int = 5000, length: int = 32, limit: int | None = None, batch_size: int = 100
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """SST-2 from ``sst2_train.tsv`` and ``sst2_dev.tsv`` (a label, a tab, a sentence) somewhere under a folder.

    Words are numbered by how often the training sentences have them, from 2; 0 pads, 1 is any other word.

    Args:
        root: the folder.
        words: size of the vocabulary, both special numbers included.
        length: words of a sentence that are used.
        limit: only the first so many training sentences.
        batch_size: sentences a batch.

    Returns:
        (training, test) batches of int64 (N, length) and labels 0 (negative) or 1.

    Raises:
        DataError: if the files are not there, or a line is no label and sentence.
    """
    train, test = (_read(Path(root), f"sst2_{part}.tsv") for part in ("train", "dev"))
    train = train[:limit]
    counts = Counter(word for _, sentence in train for word in sentence.split())
    number = {word: i for i, (word, _) in enumerate(counts.most_common(words - 2), start=2)}

    def batches(rows: list[tuple[int, str]]) -> list[tuple[Tensor, Tensor]]:
        x = torch.full((len(rows), length), PADDING)
        for i, (_, sentence) in enumerate(rows):
            found = [number.get(word, UNKNOWN) for word in sentence.split()[:length]]
            x[i, : len(found)] = torch.tensor(found)
        y = torch.tensor([label for label, _ in rows])
        return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    return batches(train), batches(test)


def _read(root: Path, name: str) -> list[tuple[int, str]]:
    path = next(root.glob(f"**/{name}"), None)
    if path is None:
        raise DataError(
            f"no {name} under {root}; get SST-2 (GLUE's or the Stanford Sentiment Treebank's) and put it there"
        )
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(lines, None)
        for line, row in enumerate(lines, start=2):
            if len(row) != 2 or row[0] not in ("0", "1") or not row[1].split():
                raise DataError(f"{path}:{line}: expected 0 or 1, a tab and a sentence, got {row}")
            rows.append((int(row[0]), row[1]))
    return rows
