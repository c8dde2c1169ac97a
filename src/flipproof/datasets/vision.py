"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from a folder of the user's; nothing is ever downloaded.

A folder is one that torchvision's own data sets fill (`torchvision.datasets.CIFAR10(root, download=True)`), or one that
holds `cifar10.npz` (`x_train y_train x_test y_test`, uint8, channels last) or the `*-ubyte.gz` files of MNIST.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from math import prod
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
        images, labels = (_member(found, f"{part}_{split}.npy") for part in "xy")
        if images.shape[1:] != (32, 32, 3) or labels.size != len(images):
            raise DataError(
                f"{found}: expected x_{split} of shape (N, 32, 32, 3) and N labels, got {images.shape} and "
                f"{labels.shape}"
            )
        labels = labels.reshape(-1)
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
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise DataError(
                    f"{path} is not an IDX file of bytes: it begins with {start.hex()}, expected 000008 and a rank"
                )
            rank = start[3]
            header = file.read(4 * rank)
            shape = tuple(int(size) for size in np.frombuffer(header[: len(header) // 4 * 4], dtype=">u4"))
            wanted = _bounded(path, prod(shape))
            values = np.frombuffer(file.read(wanted + 1), dtype=np.uint8)  # one more, to see whether it ends there
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(shape) != rank or len(values) != wanted:
        more = "more" if len(values) > wanted else f"{len(values):,}"
        raise DataError(f"{path} says it holds {shape} bytes, but {more} follow its header")
    return values.reshape(shape)


DEFLATE = 1032
"""No byte of a gzip or zip file gives more than this many (zlib's technical details): what claims more is refused."""


def _bounded(path: Path, size: int) -> int:
    length = path.stat().st_size
    if size > length * DEFLATE:
        raise DataError(f"{path} says that its {length:,} bytes hold {size:,}, more than any file of that length can")
    return size


def _member(path: Path, name: str) -> Any:
    """One array of whole numbers out of an .npz file.

    Its header is checked against the length of the file before anything is made of that size; objects are never
    unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise DataError(f"{path}: {name} is of .npy version {version}, expected (1, 0) or (2, 0)")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype.kind not in "ui" or fortran:
                raise DataError(f"{path}: expected {name} to hold whole numbers in C order, got {dtype}")
            wanted = _bounded(path, prod(shape) * dtype.itemsize)
            content = file.read(wanted + 1)
    except KeyError:
        raise DataError(f"{path} holds no {name}") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {name} in {path}: {error}") from error
    if len(content) != wanted:
        raise DataError(f"{path}: {name} says it holds {shape} {dtype}, but other bytes follow its header")
    return np.frombuffer(content, dtype).reshape(shape)


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
