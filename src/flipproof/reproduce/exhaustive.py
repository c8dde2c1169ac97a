"""Every single bit of ResNet-20 on a hundred images: the ground truth that estimators are held against.

    python -m flipproof.reproduce.exhaustive --data-root DATA --out docs/results/exhaustive --shards 1:200

runs the shards that are asked for and writes what all shards in the journal come to. The bits are those of all
parameters of the public checkpoint for CIFAR-10, in float32. The images are the first hundred of the test set, whether
the network is right about them or not, in one batch. Network and images are laid out channels last, in which a CPU runs
it fastest.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn

from flipproof.analysis.bit_table import BitTable
from flipproof.analysis.exhaustive import inject_all
from flipproof.datasets import cifar10
from flipproof.errors import ConfigError, DataError
from flipproof.models import load_weights, resnet20
from flipproof.reports.bits import bit_table_figure
from flipproof.reports.figures import save
from flipproof.reports.tables import percent
from flipproof.reproduce.published import write_table
from flipproof.running.scales import OUTCOMES

SUMMARY = "Every single bit of ResNet-20 on 100 images, in 200 shards: the ground truth by tensor and bit"
IMAGES, SHARDS = 100, 200
_FIRST = {"smoke": 1, "paper": SHARDS}
"""Shards of a scale."""
_HAND = {"smoke": 64, "paper": 2000}
"""Flips that are done again by hand."""
_COLUMNS = ("word", "bit", *OUTCOMES)
_ENDS = ("rate", "low", "high")

Batches = list[tuple[Tensor, Tensor]]


def subject(data_root: Path) -> tuple[nn.Module, Batches]:
    """ResNet-20 with the public weights, and the images.

    Raises:
        DataError: if checkpoint or images are not under the folder.
    """
    checkpoint = next(Path(data_root).glob("**/resnet20-*.th"), None)
    if checkpoint is None:
        raise DataError(
            f"no resnet20-*.th under {data_root}; get it from https://github.com/akamaster/pytorch_resnet_cifar10"
        )
    model = resnet20()
    load_weights(model, checkpoint)
    images = [
        (x.to(memory_format=torch.channels_last), y) for x, y in cifar10(data_root, batch_size=IMAGES, limit=IMAGES)
    ]
    return model.eval().to(memory_format=torch.channels_last), images


def run_shards(data_root: Path, journal: Path, shards: range, *, of: int = SHARDS, workers: int = 1) -> None:
    """Do shards, one call each.

    Args:
        data_root: folder with checkpoint and images.
        journal: of all shards.
        shards: their numbers, from 1 to `of`.
        of: how many there are.
        workers: processes.
    """
    model, images = subject(data_root)
    for number in shards:
        inject_all(model, images, shard=f"{number}/{of}", journal=journal, workers=workers)


def by_hand(model: nn.Module, images: Batches, flips: pd.DataFrame) -> pd.DataFrame:
    """The same flips without anything of flipproof: one bit of the weight's bytes, and a whole forward in PyTorch.

    Args:
        model: in eval mode; its weights are as before at the end.
        images: one batch.
        flips: rows with `site`, `word` and `bit`.

    Returns:
        One row a flip, with its samples by outcome, counted in NumPy.
    """
    (inputs, _), *_ = images
    held = dict(model.named_parameters())
    rows = []
    with torch.no_grad(), _one_thread():
        golden = model(inputs).numpy().copy()
        for site, word, bit in zip(*(flips[name].tolist() for name in ("site", "word", "bit")), strict=True):
            weights = held[site].data
            before = weights.clone()
            flat = before.contiguous().numpy().reshape(-1).copy()
            flat.view(np.uint32)[word] ^= np.uint32(1 << bit)
            weights.copy_(torch.from_numpy(flat).reshape(before.shape))
            found = model(inputs).numpy()
            weights.copy_(before)
            due = np.isnan(found).any(axis=1)
            masked = (found.view(np.uint32) == golden.view(np.uint32)).all(axis=1) & ~due
            critical = (found.argmax(axis=1) != golden.argmax(axis=1)) & ~due & ~masked
            counts = (masked, ~masked & ~critical & ~due, critical, due)
            rows.append((site, word, bit, *(int(part.sum()) for part in counts)))
        assert (model(inputs).numpy().view(np.uint32) == golden.view(np.uint32)).all(), "the weights are not as before"
    return pd.DataFrame(rows, columns=["site", *_COLUMNS])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_by_hand(found: BitTable, data_root: Path, count: int) -> tuple[int, pd.DataFrame]:
    """Do a sample of the table's flips by hand: evenly many of every tensor and bit.

    Args:
        found: the table.
        data_root: folder with checkpoint and images.
        count: about how many.

    Returns:
        How many flips, and those whose outcomes differ in any sample's count.
    """
    model, images = subject(data_root)
    flips = found.flips
    each = max(1, round(count / max(1, len(found.table))))
    mixed = flips.sample(frac=1.0, random_state=0)
    chosen = mixed.groupby(["site", "bit"], sort=False).head(each).head(count)
    theirs = by_hand(model, images, chosen)
    ours = chosen[["site", *_COLUMNS]].reset_index(drop=True)
    return len(chosen), theirs[(ours != theirs).any(axis=1)]


def reproduce(
    *, scale: Literal["smoke", "paper"], data_root: Path, out: Path, workers: int, console: Console
) -> pd.DataFrame:
    """Run the first shard, or all of them: a day and a half of one core. Interrupted, it resumes from `out`.

    Returns:
        One row a tensor and bit.

    Raises:
        DataError: if CIFAR-10 or the checkpoint is not under `data_root`.
        ConfigError: if the scale is unknown.
    """
    if scale not in _FIRST:
        raise ConfigError(f"scale is 'smoke' or 'paper', got {scale!r}")
    journal = out / "journal.jsonl"
    run_shards(data_root, journal, range(1, _FIRST[scale] + 1), workers=workers)
    found = BitTable.load(journal)
    console.print(write_page(found, out, *check_by_hand(found, data_root, _HAND[scale])), markup=False)
    return found.table


def write_page(found: BitTable, out: Path, checked: int, differing: pd.DataFrame) -> str:
    """Write the tables `bits.csv`, `sites.csv` and `table.csv`, the figure, and `numbers.md`.

    Args:
        found: what is done.
        out: folder.
        checked: flips that were done again by hand.
        differing: those that came out otherwise.

    Returns:
        The numbers, in a few lines.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = ["site", "bit", "flips", "tried", *OUTCOMES, *(f"{n}_{end}" for n in OUTCOMES[2:] for end in _ENDS)]
    found.table[kept].to_csv(out / "table.csv", index=False, float_format="%.4g")
    found.sites.to_csv(out / "sites.csv", index=False, float_format="%.4g")
    save(bit_table_figure(found), out / "table.png")
    shown = found.bits[["bit", "flips", "tried"]].copy()
    for name in OUTCOMES:
        low, high = (found.bits[f"{name}_{end}"].map(percent) for end in ("low", "high"))
        shown[f"{name} %"] = found.bits[f"{name}_rate"].map(percent) + " [" + low + ", " + high + "]"
    write_table(shown, out / "bits", title="ResNet-20, single flips, by bit")
    total = found.total
    lines = [
        f"{found.tried:,} of {found.of:,} flips ({percent(found.done)} %), {found.samples} images each",
        f"audited on a fresh copy: {found.audited:,}, all the same",
        f"done again by hand: {checked:,}, of which {len(differing)} differ",
        f"processor hours for all flips, at the pace of those done: {found.hours:.1f}",
        *(
            f"{name}: {percent(total[f'{name}_rate'])} % [{percent(total[f'{name}_low'])}, "
            f"{percent(total[f'{name}_high'])}] of all answers"
            for name in OUTCOMES
        ),
    ]
    text = "\n".join(lines)
    about = f"{date.today().isoformat()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    listed = "\n".join(f"- {line}" for line in lines)
    (out / "numbers.md").write_text(f"# ResNet-20, single flips\n\n{about}\n\n{listed}\n", encoding="utf-8")
    return text


def main() -> None:
    """Run shards, check, write."""
    parser = argparse.ArgumentParser(description="Every single bit of ResNet-20 on a hundred images.")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("results/exhaustive"))
    parser.add_argument("--shards", default=f"1:{SHARDS}", help="the first and the last one; 1:0 runs none")
    parser.add_argument("--of", type=int, default=SHARDS, help="how many shards there are")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--by-hand", type=int, default=0, help="flips to do again by hand; without any, no page is written"
    )
    chosen = parser.parse_args()
    first, last = (int(part) for part in chosen.shards.split(":"))
    journal = chosen.out / "journal.jsonl"
    run_shards(chosen.data_root, journal, range(first, last + 1), of=chosen.of, workers=chosen.workers)
    if chosen.by_hand:
        found = BitTable.load(journal)
        checked, differing = check_by_hand(found, chosen.data_root, chosen.by_hand)
        print(write_page(found, chosen.out, checked, differing))
        if len(differing):
            print(differing.to_string(index=False))


if __name__ == "__main__":
    main()
