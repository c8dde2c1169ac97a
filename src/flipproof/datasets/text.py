"""Sentences with a sentiment (SST-2) as numbered words, and plays of Shakespeare as numbered characters."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import DataError

PADDING, UNKNOWN = 0, 1
HELD_OUT = 0.1
"""Share of the plays, the last of them, that nothing is trained on."""


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


def tinyshakespeare(
    root: str | Path,
    split: Literal["train", "test"] = "test",
    *,
    context: int = 64,
    stride: int = 64,
    targets: Literal["next", "all"] = "next",
    batch_size: int = 100,
    limit: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Windows of characters from `tinyshakespeare.txt` somewhere under a folder, and the characters that follow.

    Characters are numbered in the order of their code points, over the whole file: 65 of them. The first nine tenths of
    the text are "train", the last tenth is "test"; no window reaches across.

    Args:
        root: the folder.
        split: "train" or "test".
        context: characters of a window.
        stride: characters from the beginning of one window to that of the next.
        targets: "next" for the character that follows the window, one a sample; "all" for the one that follows each.
        batch_size: windows a batch.
        limit: only the first so many windows.

    Returns:
        Batches of int64 (N, context) and (N,), or (N, context) with ``targets="all"``.

    Raises:
        DataError: if the file is not there, is not UTF-8 text, or holds no window.

    Source:
        The plays are in the public domain; the file is that of A. Karpathy's char-rnn (2015).
    """
    if min(context, stride, batch_size, 1 if limit is None else limit) < 1:
        raise DataError(
            f"context, stride, batch_size and limit are at least 1, got {context}, {stride}, {batch_size} and {limit}"
        )
    path = next(Path(root).glob("**/tinyshakespeare.txt"), None)
    if path is None:
        raise DataError(
            f"no tinyshakespeare.txt under {root}; get it once from "
            f"https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    held_out = len(text) - int(len(text) * HELD_OUT)
    part = text[:held_out] if split == "train" else text[held_out:]
    if len(part) <= context:
        raise DataError(f"{path}: its {split} part has {len(part)} characters, no window of {context} and one more")
    windows = torch.tensor([number[character] for character in part]).unfold(0, context + 1, stride)[:limit]
    x = windows[:, :-1].contiguous()
    y = windows[:, 1:].contiguous() if targets == "all" else windows[:, -1].contiguous()
    return list(zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True))


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
