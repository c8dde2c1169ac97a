"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from a folder of the user's; nothing is ever downloaded.

A folder is one that torchvision's own data sets fill (`torchvision.datasets.CIFAR10(root, download=True)`), or one that
holds `cifar10.npz` (`x_train y_train x_test y_test`, uint8, channels last) or the `*-ubyte.gz` files of MNIST.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flipproof.errors import DataError

Split = Literal["train", "test"]
Batches = list[tuple[Tensor, Tensor]]
Bytes = npt.NDArray[np.uint8]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per-channel constants that the public CIFAR ResNets were trained with."""


def cifar10(
    root: str | Path,
    split: Split = "test",
    *,
    batch_size: int = 100,
    limit: int | None = None,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
) -> Batches:
    """CIFAR-10: float32 images (N, 3, 32, 32), each channel normalised as (x / 255 − mean) / std, and targets in 0…9.

    Args:
        root: a folder of torchvision's, or one with `cifar10.npz` in it or in its `cifar10/`.
        split: "train" or "test".
        batch_size: images a batch.
        limit: only the first so many images.
        mean: subtracted from every channel.
        std: divides every channel.

    Raises:
        DataError: if the data is not there, with the line that fetches it.
    """
    found = _first(root, "cifar10.npz", "cifar10/cifar10.npz")
    if found:
        with np.load(found, allow_pickle=False) as arrays:
            images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    else:
        images, labels = _torchvision("CIFAR10", root, split)
    return _batches(images, labels, mean, std, batch_size, limit)


def cifar100(
    root: str | Path,
    split: Split = "test",
    *,
    batch_size: int = 100,
    limit: int | None = None,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
) -> Batches:
    """CIFAR-100 from torchvision's folder; as `cifar10`, with targets in 0…99."""
    return _batches(*_torchvision("CIFAR100", root, split), mean, std, batch_size, limit)


def mnist(root: str | Path, split: Split = "test", *, batch_size: int = 100, limit: int | None = None) -> Batches:
    """MNIST: float32 images (N, 1, 28, 28) in [0, 1] and targets in 0…9.

    Args:
        root: a folder of torchvision's (`MNIST/raw/…-ubyte`), or one with `…-ubyte.gz` in it or in its `mnist/`.
        split: "train" or "test".
        batch_size: images a batch.
        limit: only the first so many images.

    Raises:
        DataError: if the data is not there or its files are damaged.
    """
    return _batches(*_idx(root, split, ("MNIST/raw", "mnist", "."), "MNIST"), (0.0,), (1.0,), batch_size, limit)


def fashion_mnist(
    root: str | Path, split: Split = "test", *, batch_size: int = 100, limit: int | None = None
) -> Batches:
    """Fashion-MNIST from `FashionMNIST/raw`, `fashion-mnist/` or the folder itself; as `mnist`."""
    folders = ("FashionMNIST/raw", "fashion-mnist", ".")
    return _batches(*_idx(root, split, folders, "FashionMNIST"), (0.0,), (1.0,), batch_size, limit)


def read_idx(path: Path) -> Bytes:
    """An array of bytes from an IDX file, gzipped or not (LeCun's format: magic 0, 0, 8, dimensions; big-endian sizes).

    Raises:
        DataError: if it is no such file or ends early.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(
            f"{path} is not an IDX file of bytes: it begins with {raw[:4].hex()}, expected 000008 and a rank"
        )
    rank = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4 : 4 + 4 * rank], dtype=">u4"))
    values = np.frombuffer(raw, dtype=np.uint8, offset=min(4 + 4 * rank, len(raw)))
    if len(shape) != rank or len(values) != int(np.prod(shape)):
        raise DataError(f"{path} says it holds {shape} bytes, but {len(values):,} follow its header")
    return values.reshape(shape)


def _idx(root: str | Path, split: Split, folders: tuple[str, ...], name: str) -> tuple[Bytes, Bytes]:
    prefix = "train" if split == "train" else "t10k"
    parts = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        places = [f"{folder}/{prefix}-{kind}{end}" for folder in folders for end in ("", ".gz")]
        found = _first(root, *places)
        if found is None:
            raise DataError(_missing(name, root, f"{prefix}-{kind}[.gz]"))
        parts.append(read_idx(found))
    return parts[0], parts[1]


def _torchvision(name: str, root: str | Path, split: Split) -> tuple[Bytes, Any]:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise DataError(f"reading {name} takes torchvision: pip install 'flipproof[vision]'") from error
    try:
        data = getattr(torchvision.datasets, name)(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(_missing(name, root, str(error))) from error
    return data.data, data.targets


def _missing(name: str, root: str | Path, what: str) -> str:
    return (
        f"no {name} in {Path(root).resolve()} ({what}); fetch it once with "
        f'python -c "import torchvision; torchvision.datasets.{name}({str(root)!r}, download=True)"'
    )


def _first(root: str | Path, *places: str) -> Path | None:
    return next((path for place in places if (path := Path(root) / place).is_file()), None)


def _batches(
    images: Bytes,
    labels: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    limit: int | None,
) -> Batches:
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 image, got {limit}")
    x = torch.from_numpy(np.array(images[:limit])).float() / 255
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    x = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    y = torch.from_numpy(np.array(labels[:limit], dtype=np.int64))
    return list(zip(torch.split(x.contiguous(), batch_size), torch.split(y, batch_size), strict=True))
