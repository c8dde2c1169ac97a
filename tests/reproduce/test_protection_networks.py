"""The networks of protection: trained once, tried on data that neither training nor calibration has seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from flipproof.errors import ConfigError, DataError
from flipproof.models import resnet20
from flipproof.models.training import cache_folder
from flipproof.reproduce import protection_networks
from flipproof.reproduce.protection_networks import CONTEXT, NETWORKS, STRIDE, measure, trained

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """70 test images of CIFAR-10's shape, numbered by their first pixel; 20 of them to calibrate with."""
    monkeypatch.setattr(protection_networks, "CALIBRATION", 20)
    monkeypatch.setattr(protection_networks, "BATCH", 15)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.zeros((70, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(70)
    arrays = {"x_test": images, "y_test": np.arange(70) % 10, "x_train": images[:40], "y_train": np.arange(40) % 10}
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "cifar10.npz", **arrays)
    return folder


@pytest.fixture
def runs(monkeypatch):
    """The compact CNN is not trained for minutes: what would train it is asked for and counted."""
    seen: list[tuple[Path, int]] = []

    def train(model: nn.Module, folder: Path) -> nn.Module:
        """Not at all."""
        seen.append((folder, torch.get_num_threads()))
        with torch.no_grad():
            model.classifier.bias[3] += 1000.0
        return model.eval()

    monkeypatch.setitem(NETWORKS, "compact_cnn", replace(NETWORKS["compact_cnn"], weights=train))
    return seen


def numbers(batches):
    images = torch.cat([inputs for inputs, _ in batches])
    return (255 * (images[:, 0, 0, 0] * 0.229 + 0.485)).round().long().tolist()


def test_trained_once_on_one_thread_and_tried_on_other_samples_than_calibrated_with(root, runs):
    threads = torch.get_num_threads()
    first = trained("compact_cnn", root, samples=40)
    again = trained("compact_cnn", root, samples=40)
    assert runs == [(root, 1)]
    assert torch.get_num_threads() == threads
    assert not first.model.training
    assert not again.model.training
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert numbers(first.calibration) == list(range(20))
    assert numbers(first.test) == list(range(20, 60))
    assert [len(targets) for _, targets in first.test] == [15, 15, 10]
    assert torch.cat([targets for _, targets in first.test]).tolist() == [i % 10 for i in range(20, 60)]
    assert numbers(trained("compact_cnn", root, samples=None).test) == list(range(20, 70))
    assert sorted(path.name for path in cache_folder().iterdir()) == [
        "protection-compact_cnn-1.safetensors",
        "protection-compact_cnn-1.seconds",
    ]


def test_a_checkpoint_is_found_and_loaded(root):
    with pytest.raises(DataError, match=r"no resnet20-\*\.th under"):
        trained("resnet20", root, samples=40)
    state = resnet20().state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, root / "resnet20-1.th")
    model = trained("resnet20", root, samples=40).model
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_what_cannot_be_given_is_refused(root):
    with pytest.raises(ConfigError, match=r"no network is called 'bert'; there are resnet20, .*, gpt"):
        trained("bert", root)
    with pytest.raises(ConfigError, match="samples is at least 1, got 0"):
        trained("resnet20", root, samples=0)
    with pytest.raises(DataError, match=r"takes 71 held-out samples of CIFAR-10, .* has 70"):
        trained("resnet20", root, samples=51)
    with pytest.raises(DataError, match="FashionMNIST"):
        trained("vit", root)
    with pytest.raises(DataError, match="tinyshakespeare"):
        trained("gpt", root)


def test_no_character_is_in_both_parts_of_the_text(root, monkeypatch):
    """No character comes twice in the held-out text, so that each says where it is."""
    held_out = "".join(chr(5000 + i) for i in range(2000))
    (root / "tinyshakespeare.txt").write_text(chr(5000) * 18_000 + held_out, encoding="utf-8")
    monkeypatch.setitem(NETWORKS, "gpt", replace(NETWORKS["gpt"], weights=lambda model, _: model.eval()))
    found = trained("gpt", root, samples=None)
    (calibration, following), (test, _) = (
        (torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in (found.calibration, found.test)
    )
    assert torch.equal(calibration, STRIDE * torch.arange(20)[:, None] + torch.arange(CONTEXT))
    assert torch.equal(following, calibration[:, -1] + 1)
    assert int(following.max()) < int(test.min()) <= int(following.max()) + STRIDE


def test_the_table(root, runs, tmp_path, monkeypatch):
    """A network that always says 3 is right for one in ten."""
    row = measure("compact_cnn", root)
    assert (row["samples"], row["accuracy"], row["unseen_samples"], row["unseen_accuracy"]) == (70, 0.1, 50, 0.1)
    for part, (right, of) in {"": (7, 70), "unseen_": (5, 50)}.items():
        interval = binomtest(right, of).proportion_ci(method="wilson")
        assert (row[f"{part}low"], row[f"{part}high"]) == pytest.approx((interval.low, interval.high))
    assert row["parameters"] == 242_218
    assert isinstance(row["seconds"], float)
    arguments = ["--data-root", str(root), "--out", str(tmp_path / "out"), "--network", "compact_cnn"]
    monkeypatch.setattr(sys, "argv", ["protection_networks", *arguments])
    protection_networks.main()
    assert len(runs) == 1
    table = pd.read_csv(tmp_path / "out" / "networks.csv")
    assert table["accuracy"].tolist() == [0.1]
    page = (tmp_path / "out" / "networks.md").read_text(encoding="utf-8")
    assert "python -m flipproof.reproduce.protection_networks --data-root DATA" in page
    assert "| compact_cnn | Not at all |" in page


def test_every_network_says_how_it_was_trained():
    assert [network.recipe.split(",")[0] for network in NETWORKS.values()] == ["public checkpoint"] * 2 + ["AdamW"] * 3


@pytest.mark.skipif(not SHARED.exists(), reason="needs the checkpoints and CIFAR-10 beside the repository")
@pytest.mark.parametrize(("name", "published"), [("resnet20", 0.9173), ("resnet56", 0.9339)])
def test_the_checkpoints_are_as_accurate_as_published(name, published):
    model, test, _ = trained(name, SHARED, samples=250)
    with torch.inference_mode():
        right = sum(int((model(inputs).argmax(dim=1) == targets).sum()) for inputs, targets in test)
    assert abs(right / 250 - published) < 3 * (published * (1 - published) / 250) ** 0.5
