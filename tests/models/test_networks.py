from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

import flipproof.datasets
import flipproof.models
from flipproof.errors import ConfigError, DataError
from flipproof.models import resnet18
from flipproof.models.training import cached, train_classifier

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SHAPES = {
    "alexnet": (2, 3, 32, 32),
    "alexnet_227": (1, 1, 227, 227),
    "digits_cnn": (2, 1, 8, 8),
    "lenet5": (2, 1, 28, 28),
    "mlp": (2, 1, 28, 28),
    "resnet18": (2, 3, 32, 32),
    "resnet20": (2, 3, 32, 32),
    "resnet50": (2, 3, 32, 32),
    "resnet56": (2, 3, 32, 32),
    "vgg11": (2, 3, 32, 32),
    "vgg16": (2, 3, 32, 32),
}


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_shapes(name, shape):
    assert getattr(flipproof.models, name)(num_classes=7).eval()(torch.randn(shape)).shape == (shape[0], 7)


def count(model, kinds):
    return sum(sum(1 for m in model.modules() if isinstance(m, kind)) for kind in kinds)


def weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def test_the_counts_that_the_papers_print():
    from flipproof.models import alexnet, alexnet_227, lenet5, vgg11, vgg16

    assert [8 * weights(vgg11()), 5 * weights(vgg11())] == [225_064_448, 140_665_280]  # FORTUNE, table II, in bits
    assert weights(alexnet_227()) == 58_289_504
    assert sum(p.numel() for p in vgg16().parameters()) == 14_719_818
    assert sum(p.numel() for p in alexnet().parameters()) == 23_272_266
    assert (count(vgg16(), [nn.ReLU]), count(alexnet(), [nn.ReLU])) == (13, 7)
    deepvigor = vgg16(100, batch_norm=True, hidden=(512,))  # 13 CONV, 13 BN, 5 POOL, 2 FC
    assert [count(deepvigor, [k]) for k in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)] == [13, 13, 5, 2]
    deepvigor = alexnet(batch_norm=True)  # 5 CONV, 3 POOL, 2 BN, 3 FC
    assert [count(deepvigor, [k]) for k in (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.Linear)] == [5, 3, 2, 3]
    sizes = []
    model = lenet5()
    for layer in (model.conv1, model.conv2, model.conv3, model.fc1):
        layer.register_forward_hook(lambda _m, _i, out: sizes.append(out[0].numel()))
    model(torch.zeros(1, 1, 28, 28))
    assert sum(sizes) == 6_508


def test_lenet5_takes_both_image_sizes():
    assert flipproof.models.lenet5(in_channels=3, image_size=32)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="image_size=30"):
        flipproof.models.lenet5(image_size=30)


def test_mlp_names_its_activations():
    with pytest.raises(ValueError, match="got 'tanh'"):
        flipproof.models.mlp(activation="tanh")


def test_resnet50_has_the_parameters_of_torchvisions_with_a_small_stem():
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.resnet50(num_classes=10)
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    ours = flipproof.models.resnet50()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters()) - stem


@pytest.mark.skipif(not SHARED.exists(), reason="needs the trained checkpoints and CIFAR-10 beside the repository")
def test_the_public_checkpoint_is_as_accurate_as_it_was_published():
    model = flipproof.models.resnet20()
    flipproof.models.load_weights(model, SHARED / "checkpoints" / "resnet20-12fca82f.th")
    batches = flipproof.datasets.cifar10(SHARED, limit=1000)
    with torch.inference_mode():
        right = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in batches)
    assert 895 <= right <= 940  # 91.73 % of all 10,000; three standard errors of 1,000 are 2.6 points


def test_weights_that_do_not_fit_or_are_no_weights(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x05")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "list.pt", "storages")
    model = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, message in (
        ("other.pt", "do not fit Linear"),
        ("list.pt", "holds a list"),
        ("module.pt", "cannot read weights"),
        ("torn.safetensors", "cannot read weights"),
        ("absent.pt", "cannot read weights"),
        ("old.pt", "is a tar archive, which PyTorch wrote before 0.4"),
    ):
        with pytest.raises(ConfigError, match=message):
            flipproof.models.load_weights(model, tmp_path / name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
