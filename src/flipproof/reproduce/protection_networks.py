"""The networks that protection is measured on, each trained by one core in minutes, with data that none has seen.

    python -m flipproof.reproduce.protection_networks --data-root DATA --out docs/results/protection

trains what the cache does not have, measures every network without faults and writes the table `networks`. ResNet-20
and ResNet-56 are public checkpoints (`resnet20-*.th` somewhere under the data). The compact CNN, the ViT and the GPT
are trained here; their recipes were chosen by training and calibration samples. The others were seen once before: by a
first ViT, which was underfitted (87.3 %).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof._files import replacing
from flipproof.campaigns.statistics import wilson_interval
from flipproof.datasets import cifar10, fashion_mnist
from flipproof.datasets.text import tinyshakespeare
from flipproof.errors import ConfigError, DataError
from flipproof.models import compact_cnn, load_weights, resnet20, resnet56, small_gpt, small_vit
from flipproof.models.gpt import GPT
from flipproof.models.training import cache_folder, cached, seeded, shifted_and_flipped, token_loss, train_onecycle
from flipproof.reproduce.published import write_table

Batches = list[tuple[Tensor, Tensor]]

CALIBRATION = 2000
"""The first so many held-out samples are to calibrate and choose by, the others to judge on."""
BATCH = 250
CONTEXT, STRIDE = 64, 11
"""Characters of a window of text, and from one held-out window to the next: a tenth of the plays holds 10,135."""

NOTES = """
```sh
python -m flipproof.reproduce.protection_networks --data-root DATA --out docs/results/protection
```

Made on {date} with torch {torch}. No faults, float32. `accuracy` is over all held-out samples, `unseen_accuracy` over
those behind the first {calibration:,}, by which the recipes were chosen (a first ViT, underfitted, was seen on all of
them: 87.3 %). `low` and `high` are 95 % Wilson intervals.
`seconds` is processor time of training on one thread. A sample of tinyshakespeare is a window of {context} characters
and the one that follows. Windows begin {stride} characters apart and overlap: their interval may be too narrow.

| network | trained by |
|---|---|
{recipes}
"""


class Trained(NamedTuple):
    """A network and data that it was not trained on.

    Attributes:
        model: in eval mode.
        test: batches to judge on.
        calibration: batches to calibrate and choose by; no sample, and of text no character, is in `test` too.
    """

    model: nn.Module
    test: Batches
    calibration: Batches


@dataclass(frozen=True)
class Network:
    """Where a network comes from and what it is tried on.

    Attributes:
        build: makes it, untrained.
        data: the name of its data.
        weights: the pattern of its checkpoint's name, or what trains it on data under a folder and says how.
        held_out: its held-out data under a folder, in `BATCH`es, at most so many samples.
        apart: samples between calibration and test that neither has.
    """

    build: Callable[[], nn.Module]
    data: str
    weights: str | Callable[[nn.Module, Path], nn.Module]
    held_out: Callable[[Path, int | None], Batches]
    apart: int = 0

    @property
    def recipe(self) -> str:
        """How it is trained, in words."""
        return "public checkpoint" if isinstance(self.weights, str) else (self.weights.__doc__ or "").rstrip(".")


def trained(name: str, data_root: str | Path, *, samples: int | None = 2000) -> Trained:
    """A network by name, trained the first time and from the cache afterwards, with held-out data in two parts.

    Args:
        name: "resnet20", "resnet56", "compact_cnn", "vit" or "gpt".
        data_root: the folder with CIFAR-10, Fashion-MNIST, tinyshakespeare and the checkpoints.
        samples: how many to judge on; None for all there are, about 8,000.

    Raises:
        ConfigError: if there is no such network.
        DataError: if data or checkpoint are not under the folder, or the data has fewer samples.
    """
    if name not in NETWORKS:
        raise ConfigError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}")
    if samples is not None and samples < 1:
        raise ConfigError(f"samples is at least 1, got {samples}")
    network, root = NETWORKS[name], Path(data_root)
    first = CALIBRATION + network.apart
    held_out = network.held_out(root, None if samples is None else first + samples)
    inputs, targets = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    if len(inputs) < first + (samples or 1):
        raise DataError(
            f"{name} takes {first + (samples or 1):,} held-out samples of {network.data}, {root} has {len(inputs):,}"
        )
    model = _model(name, network, root)
    return Trained(
        model,
        test=_batches(inputs[first:], targets[first:]),
        calibration=_batches(inputs[:CALIBRATION], targets[:CALIBRATION]),
    )


def _batches(inputs: Tensor, targets: Tensor) -> Batches:
    return list(zip(torch.split(inputs, BATCH), torch.split(targets, BATCH), strict=True))


def _model(name: str, network: Network, root: Path) -> nn.Module:
    weights = network.weights
    if isinstance(weights, str):
        checkpoint = next(root.glob(f"**/{weights}"), None)
        if checkpoint is None:
            raise DataError(
                f"no {weights} under {root}; get it from https://github.com/akamaster/pytorch_resnet_cifar10"
            )
        model = network.build()
        load_weights(model, checkpoint)
        return model.eval()
    return cached(_key(name), seeded(network.build), lambda model: _timed(name, partial(weights, model, root)))


def _key(name: str) -> str:
    return f"protection-{name}-1"


def _timed(name: str, train: Callable[[], nn.Module]) -> nn.Module:
    """Train on one thread, on which the weights depend, and keep beside them how long it took."""
    with _one_thread():
        start = time.process_time()
        model = train()
        seconds = time.process_time() - start
    with suppress(ConfigError), replacing(_seconds_file(name)) as temporary:
        temporary.write_text(f"{seconds:.0f}\n", encoding="utf-8")
    return model


def _seconds_file(name: str) -> Path:
    return cache_folder() / f"{_key(name)}.seconds"


def _seconds(name: str) -> float:
    """What training took, in seconds of one core; NaN if nobody knows."""
    try:
        return float(_seconds_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return float("nan")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _all(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def _train_compact_cnn(model: nn.Module, root: Path) -> nn.Module:
    """AdamW, one cycle up to 0.01, decay 0.05, 28 epochs of 12,000 images, moved by up to 4 pixels and mirrored."""
    images, classes = _all(cifar10(root, "train", limit=12_000))
    train_onecycle(
        model.to(memory_format=torch.channels_last),
        images,
        classes,
        epochs=28,
        lr=0.01,
        weight_decay=0.05,
        augment=shifted_and_flipped,
    )
    return model.to(memory_format=torch.contiguous_format)


def _train_vit(model: nn.Module, root: Path) -> nn.Module:
    """AdamW, one cycle up to 0.002, decay 0.05, 7 epochs of 60,000 images in batches of 64."""
    images, classes = _all(fashion_mnist(root, "train"))
    return train_onecycle(model, images, classes, epochs=7, batch_size=64, lr=2e-3, weight_decay=0.05)


def _train_gpt(model: nn.Module, root: Path) -> nn.Module:
    """AdamW, one cycle up to 0.003, decay 0.1, 3 epochs of 62,737 windows 16 characters apart, all positions."""
    assert isinstance(model, GPT)
    tokens, following = _all(tinyshakespeare(root, "train", context=CONTEXT, stride=16, targets="all"))
    return train_onecycle(
        model,
        tokens,
        following,
        epochs=3,
        batch_size=64,
        lr=3e-3,
        weight_decay=0.1,
        outputs=model.all_positions,
        loss=token_loss,
    )


def _cifar(root: Path, limit: int | None) -> Batches:
    return cifar10(root, batch_size=BATCH, limit=limit)


def _clothes(root: Path, limit: int | None) -> Batches:
    return fashion_mnist(root, batch_size=BATCH, limit=limit)


def _text(root: Path, limit: int | None) -> Batches:
    return tinyshakespeare(root, context=CONTEXT, stride=STRIDE, batch_size=BATCH, limit=limit)


NETWORKS = {
    "resnet20": Network(resnet20, "CIFAR-10", "resnet20-*.th", _cifar),
    "resnet56": Network(resnet56, "CIFAR-10", "resnet56-*.th", _cifar),
    "compact_cnn": Network(compact_cnn, "CIFAR-10", _train_compact_cnn, _cifar),
    "vit": Network(small_vit, "Fashion-MNIST", _train_vit, _clothes),
    "gpt": Network(small_gpt, "tinyshakespeare", _train_gpt, _text, apart=CONTEXT // STRIDE),
}
"""Name → network. Windows that reach from one part of the held-out text into the other are in neither."""


def measure(name: str, data_root: str | Path) -> dict[str, object]:
    """Accuracy without faults over all held-out samples, and over those that nothing is chosen by.

    Args:
        name: of the network.
        data_root: as for `trained`.

    Returns:
        A row of the table: parameters, shares right with 95 % Wilson intervals, seconds of training on one core.

    Raises:
        ConfigError: as `trained`.
        DataError: as `trained`.
    """
    model, test, calibration = trained(name, data_root, samples=None)
    row: dict[str, object] = {"network": name, "data": NETWORKS[name].data, "parameters": _count(model)}
    chosen, judged = _right(model, calibration), _right(model, test)
    for part, (right, of) in (("", (chosen[0] + judged[0], chosen[1] + judged[1])), ("unseen_", judged)):
        low, high = wilson_interval(right, of)
        row |= {f"{part}samples": of, f"{part}accuracy": right / of, f"{part}low": low, f"{part}high": high}
    return row | {"seconds": _seconds(name)}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _right(model: nn.Module, batches: Batches) -> tuple[int, int]:
    """How many answers are right, of how many."""
    with torch.inference_mode():
        right = sum(int((model(inputs).argmax(dim=1) == targets).sum()) for inputs, targets in batches)
    return right, sum(len(targets) for _, targets in batches)


def write_page(table: pd.DataFrame, out: Path) -> None:
    """Write `networks.csv` and `networks.md`, with the command, the date and how each network was trained.

    Args:
        table: rows of `measure`.
        out: the folder.
    """
    path = out / "networks"
    write_table(table, path, title="The networks of protection, without faults")
    notes = NOTES.format(
        date=date.today().isoformat(),
        torch=torch.__version__,
        calibration=CALIBRATION,
        context=CONTEXT,
        stride=STRIDE,
        recipes="\n".join(f"| {name} | {NETWORKS[name].recipe} |" for name in table["network"]),
    )
    page = path.with_suffix(".md")
    page.write_text(page.read_text(encoding="utf-8") + notes, encoding="utf-8")


def main() -> None:
    """Train what is missing, measure, write the table."""
    parser = argparse.ArgumentParser(description="The networks that protection is measured on.")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("results/protection"))
    parser.add_argument("--network", choices=sorted(NETWORKS), action="append", help="only this one; may be repeated")
    chosen = parser.parse_args()
    table = pd.DataFrame([measure(name, chosen.data_root) for name in chosen.network or NETWORKS])
    write_page(table, chosen.out)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
