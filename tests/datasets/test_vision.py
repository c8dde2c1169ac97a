from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flipproof.datasets import cifar10, cifar100, fashion_mnist, mnist
from flipproof.datasets.vision import MEAN, STD, read_idx
from flipproof.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


def write_mnist(folder: Path, images: np.ndarray, *, compressed: bool) -> None:
    folder.mkdir(parents=True)
    labels = np.arange(len(images), dtype=np.uint8)
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize(
    ("load", "folder", "compressed"),
    [
        (mnist, "MNIST/raw", False),
        (mnist, "mnist", True),
        (mnist, ".", True),
        (fashion_mnist, "FashionMNIST/raw", False),
        (fashion_mnist, "fashion-mnist", True),
    ],
)
def test_idx_files_wherever_they_are(tmp_path, images, load, folder, compressed):
    write_mnist(tmp_path / "root" / folder, images, compressed=compressed)
    batches = load(tmp_path / "root", batch_size=4)
    assert [len(y) for _, y in batches] == [4, 3]
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32
    np.testing.assert_array_equal((x[:, 0] * 255).round().numpy(), images)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(7))


def test_torchvision_reads_the_same(tmp_path, images):
    datasets = pytest.importorskip("torchvision.datasets")
    write_mnist(tmp_path / "MNIST/raw", images, compressed=False)
    for prefix in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / "MNIST/raw" / prefix).write_bytes(idx(np.zeros((1, 28, 28), np.uint8)))
    reference = datasets.MNIST(tmp_path, train=False, download=False)
    ((x, y),) = mnist(tmp_path)
    assert torch.equal((x[:, 0] * 255).round().to(torch.uint8), reference.data)
    assert torch.equal(y, reference.targets)


def test_cifar10_from_arrays(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {
        name: rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        if name[0] == "x"
        else rng.integers(0, 10, 5, dtype=np.uint8)
        for name in ("x_train", "y_train", "x_test", "y_test")
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    ((x, y),) = cifar10(tmp_path, "train", limit=3)
    expected = (arrays["x_train"][:3].astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    assert x.is_contiguous()
    assert y.tolist() == arrays["y_train"][:3].tolist()


@pytest.mark.parametrize(("load", "name"), [(mnist, "MNIST"), (cifar10, "CIFAR10"), (cifar100, "CIFAR100")])
def test_missing_data_says_how_to_get_it(tmp_path, load, name):
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match=rf"no {name} in .*torchvision\.datasets\.{name}\(.*download=True"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x09\x01\0\0\0\x01\0", "not an IDX file of bytes"),
        (b"", "not an IDX file of bytes"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"says it holds \(5,\) bytes, but 3 follow"),
        (b"\0\0\x08\x03\0\0\0\x05", "says it holds"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_a_torn_gzip(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx(np.arange(200, dtype=np.uint8)))[:-20])
    with pytest.raises(DataError, match="cannot read"):
        read_idx(path)


def test_limit_is_checked(tmp_path, images):
    write_mnist(tmp_path / "mnist", images, compressed=True)
    with pytest.raises(DataError, match="at least 1 image, got 0"):
        mnist(tmp_path, limit=0)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data sets beside the repository")
def test_the_real_sets():
    for load, root, shape in ((mnist, SHARED, (1, 28, 28)), (fashion_mnist, SHARED, (1, 28, 28))):
        batches = load(root)
        assert sum(len(y) for _, y in batches) == 10_000
        assert tuple(batches[0][0].shape[1:]) == shape
    counts = torch.bincount(torch.cat([y for _, y in cifar10(SHARED, "train")]))
    assert counts.tolist() == [1200] * 10


class TestFilesThatClaimMoreThanTheyHold:
    @pytest.mark.parametrize("name", ["f-ubyte", "f-ubyte.gz"])
    def test_an_idx_header(self, tmp_path, name):
        header = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 2**31)
        (tmp_path / name).write_bytes(gzip.compress(header) if name.endswith(".gz") else header)
        with pytest.raises(DataError, match="bytes hold 9,903,520,314,283,042,199,192,993,792, more than any file"):
            read_idx(tmp_path / name)

    def test_bytes_behind_the_end(self, tmp_path):
        (tmp_path / "f").write_bytes(idx(np.zeros((2, 2), np.uint8)) + b"x")
        with pytest.raises(DataError, match=r"says it holds \(2, 2\) bytes, but more follow"):
            read_idx(tmp_path / "f")

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            ({"descr": "|u1", "fortran_order": False, "shape": (2**40, 32, 32, 3)}, "more than any file"),
            ({"descr": "|u1", "fortran_order": False, "shape": (1, 32, 32, 3)}, "other bytes follow its header"),
            ({"descr": "|O", "fortran_order": False, "shape": (1,)}, "to hold whole numbers in C order, got object"),
            ({"descr": "|u1", "fortran_order": False, "shape": (0,)}, r"expected x_test of shape \(N, 32, 32, 3\)"),
            (None, "holds no x_test.npy"),
        ],
    )
    def test_an_array_of_an_npz(self, tmp_path, x, message):
        with zipfile.ZipFile(tmp_path / "cifar10.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, header in (("x_test", x), ("y_test", {"descr": "<i8", "fortran_order": False, "shape": (0,)})):
                if header is not None:
                    with archive.open(f"{name}.npy", "w") as file:
                        np.lib.format.write_array_header_1_0(file, header)
        with pytest.raises(DataError, match=message):
            cifar10(tmp_path)

    def test_no_archive(self, tmp_path):
        (tmp_path / "cifar10.npz").write_bytes(b"PK but no archive")
        with pytest.raises(DataError, match="cannot read x_test"):
            cifar10(tmp_path)
