from __future__ import annotations

import pytest
import torch
from torch import nn

from flipproof.errors import DataError
from flipproof.models import digits_cnn, resnet18
from flipproof.models.training import cached, train_classifier


@pytest.mark.parametrize(("build", "shape"), [(digits_cnn, (2, 1, 8, 8)), (resnet18, (2, 3, 32, 32))])
def test_shapes(build, shape):
    assert build(num_classes=7).eval()(torch.randn(shape)).shape == (2, 7)


def test_resnet18_has_the_parameters_of_torchvisions_with_a_small_stem():
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.resnet18(num_classes=10)
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert sum(p.numel() for p in resnet18().parameters()) == sum(p.numel() for p in reference.parameters()) - stem


def blobs():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    inputs = torch.randn(60, 2, generator=generator) * 0.3 + torch.eye(3)[targets][:, :2] * 3
    return list(zip(inputs.split(20), targets.split(20), strict=True))


def test_training_learns_and_is_a_function_of_its_arguments():
    first, second = (train_classifier(nn.Linear(2, 3), blobs(), epochs=30, lr=0.1) for _ in range(1) for _ in range(2))
    assert not first.training
    right = sum(int((first(x).argmax(dim=1) == y).sum()) for x, y in blobs())
    assert right > 55
    torch.manual_seed(4)
    one = train_classifier(nn.Linear(2, 3), blobs(), epochs=2)
    torch.manual_seed(4)
    two = train_classifier(nn.Linear(2, 3), blobs(), epochs=2)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(first.weight, second.weight)  # other initial weights


@pytest.mark.parametrize(("data", "epochs"), [([], 1), (blobs(), 0)])
def test_nothing_to_train_on(data, epochs):
    with pytest.raises(DataError, match="needs data and at least one epoch"):
        train_classifier(nn.Linear(2, 3), data, epochs=epochs)


class TestCache:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        self.folder = tmp_path / "cache"
        self.trained = 0
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder))

    def load(self, build=lambda: nn.Linear(2, 3)):
        def train(model):
            self.trained += 1
            return model.eval()

        return cached("linear", build, train)

    def test_trains_once(self):
        first, second = self.load(), self.load()
        assert self.trained == 1
        assert torch.equal(first.weight, second.weight)
        assert not second.training
        assert [path.name for path in (self.folder / "flipproof").iterdir()] == ["linear.safetensors"]

    @pytest.mark.parametrize("content", [b"", b"torn", b"\xff" * 64], ids=["empty", "short", "noise"])
    def test_a_damaged_file_is_replaced(self, content):
        self.load()
        (self.folder / "flipproof" / "linear.safetensors").write_bytes(content)
        self.load()
        self.load()
        assert self.trained == 2

    def test_a_file_of_another_recipe_is_replaced(self):
        self.load()
        assert self.load(lambda: nn.Linear(5, 3)).weight.shape == (3, 5)
        assert self.trained == 2

    def test_a_folder_that_cannot_be_made_is_done_without(self):
        self.folder.write_text("a file")
        self.load()
        self.load()
        assert self.trained == 2
