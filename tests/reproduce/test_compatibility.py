"""One network a family: every verb works on it, or is refused in a sentence. And the table tells what went wrong."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings

import pytest
import torch
from torch import nn

from flipproof.errors import ModelError
from flipproof.reproduce import compatibility as table
from flipproof.reproduce.compatibility_networks import NETWORKS, Network

QUICK = ("assess, weights", "harden", "save, load", "pack_")
FAMILIES = {
    "VGG-BN, 4 convolutions": tuple(table.VERBS),
    "RegNet Y, 4 blocks": QUICK,
    "GoogLeNet": ("harden",),
    "MobileNet v3 small ×0.5 (timm)": QUICK,
    "ConvNeXt, 4 blocks": QUICK,
    "Swin, 4 blocks": QUICK,
    "Mixer, 2 blocks": QUICK,
    "RetinaNet, small": QUICK,
    "FCN, small": QUICK,
    "BERT, 2 layers": tuple(table.VERBS),
    "Llama, 2 layers": QUICK,
    "T5, 2 + 2 layers": QUICK,
    "Wav2Vec2, 2 layers": QUICK,
    "Transformer encoder, 2 layers": QUICK,
    "LSTM": tuple(table.VERBS),
    "CNN, bfloat16": QUICK,
    "MLP, dynamic int8": QUICK,
    "CNN, torch.jit.script": QUICK,
}
"""One network a family, and the verbs that the suite has time for."""


def test_every_family_is_here():
    families = {network.name: network.family for network in NETWORKS}
    assert len(NETWORKS) >= 40
    assert len(families) == len(NETWORKS)
    assert {families[name] for name in FAMILIES} == set(families.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_verb_works_or_is_refused_in_a_sentence(name):
    (network,) = [network for network in NETWORKS if network.name == name]
    if not network.installed:
        pytest.skip(f"needs {network.package}, which the dev extra installs")
    if "ONNX" in FAMILIES[name]:
        pytest.importorskip("onnxscript", reason="needs the onnx extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = list(table.tried(network, FAMILIES[name]))
    bad = [cell for cell in cells if cell.state not in table.GOOD]
    assert not bad, bad
    assert any(cell.state == table.WORKS for cell in cells) or network.family == "programs"


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


PLAIN = Network("plain", "test", "torch", lambda: (Forgetful(), lambda n: torch.randn(n, 4)))


def raises(bench):
    raise ZeroDivisionError("by zero")


def refuses(bench):
    raise ModelError("this cannot be done; do that")


def finds_nothing(bench):
    raise table.SilentError("nothing was done")


def changes(bench):
    with torch.no_grad():
        bench.subject.model.layer.weight[0, 0] += 1
    return "fine"


def leaves_in_train_mode(bench):
    bench.subject.model.train()
    return "fine"


@pytest.mark.parametrize(
    ("verb", "state", "said"),
    [
        (lambda bench: "fine", table.WORKS, "fine"),
        (raises, table.CRASHED, "ZeroDivisionError: by zero"),
        (refuses, table.REFUSED, "ModelError: this cannot be done; do that"),
        (finds_nothing, table.SILENT, "nothing was done"),
        (changes, table.SILENT, "answers otherwise"),
        (leaves_in_train_mode, table.SILENT, "training flags"),
    ],
)
def test_how_a_cell_ends(monkeypatch, verb, state, said):
    monkeypatch.setitem(table.VERBS, "verb", verb)
    (cell,) = table.tried(PLAIN, ["verb"])
    assert cell.state == state
    assert said in cell.said


def test_checks_find_a_verb_that_does_nothing(monkeypatch):
    """An `assess` that flips other bits than it says, and a `harden` without a bound."""
    with monkeypatch.context() as patched:
        patched.setattr(table, "_EXPONENT", {torch.float32: (torch.int32, 29)})
        real = table.FaultSpace.faults
        patched.setattr(table.FaultSpace, "faults", lambda self, bits: real(self, [(n, w, 30) for n, w, _ in bits]))
        (cell,) = table.tried(PLAIN, ["assess, weights"])
        assert cell.state == table.SILENT
        assert "is not the one flipped by hand" in cell.said
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    active = Network("active", "test", "torch", lambda: (net, lambda n: torch.randn(n, 4)))
    real_harden = table.harden

    def loose(*args, **kwargs):
        copy = real_harden(*args, **kwargs)
        with torch.no_grad():
            copy[1].threshold.fill_(1e30)
        return copy

    (cell,) = table.tried(active, ["harden"])
    assert cell.state == table.WORKS
    monkeypatch.setattr(table, "harden", loose)
    (cell,) = table.tried(active, ["harden"])
    assert (cell.state, cell.said) == (table.SILENT, "no bound was reached by weights a thousand times too large")


def test_the_page_says_what_was_refused_and_why():
    names = [network.name for network in NETWORKS[:2]]
    cells = [table.Cell(name, verb, table.WORKS, "", 1.0) for name in names for verb in table.VERBS]
    cells[3] = table.Cell(names[0], cells[3].verb, table.REFUSED, "ModelError: not\nso | but so", 1.0)
    cells[-1] = table.Cell(names[1], cells[-1].verb, table.REFUSED, "ModelError: not\nso | but so", 1.0)
    text = table.page(cells, "about")
    assert text.count("refused [1]") == 2
    assert "\n1. ModelError: not so \\| but so\n" in text
    assert f"2 of {len(NETWORKS)} networks × 9 verbs: 16 works, 2 refused. about" in text


def never_comes_back(bench):
    os._exit(3)


def test_a_cell_that_ends_its_process_is_a_crash_and_the_others_are_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "NETWORKS", (PLAIN,))
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("what is patched here reaches a process that is forked")
    fine = {verb: lambda bench: "fine" for verb in ("one", "three")}
    monkeypatch.setattr(table, "VERBS", {"one": fine["one"], "two": never_comes_back, "three": fine["three"]})
    cells = table.in_a_process(PLAIN, tmp_path)
    assert [cell.state for cell in cells] == [table.WORKS, table.CRASHED, table.WORKS]
    assert "ended with 3" in cells[1].said


def test_a_cell_that_never_comes_back_is_ended(monkeypatch, tmp_path):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("what is patched here reaches a process that is forked")
    monkeypatch.setattr(table, "NETWORKS", (PLAIN,))
    monkeypatch.setattr(table, "_KILLED", 0.5)
    monkeypatch.setattr(table, "_WAITED", 1)
    monkeypatch.setattr(table, "VERBS", {"waits": lambda bench: time.sleep(60), "works": runs_for_ever})
    waits, works = table.in_a_process(PLAIN, tmp_path)
    assert waits.state == works.state == table.CRASHED
    assert "Timeout" in waits.said
    assert "runs_for_ever" in works.said


def runs_for_ever(bench):
    while True:
        pass
