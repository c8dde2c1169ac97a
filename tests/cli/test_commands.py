"""The command line as people use it: `main()` with arguments, what it prints and writes, and how it exits."""

from __future__ import annotations

import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import flipproof as fp
import flipproof.models
from flipproof.cli import VERBS, main

LSTM = '''
import torch
from torch import nn

class Tagger(nn.Module):
    """A classifier with an LSTM and a dict as output."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        states, _ = self.lstm(x)
        return {"logits": self.head(states[:, -1]), "states": states}

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield torch.randn(9, 5, 3, generator=generator), torch.arange(9) % 3

def images():
    yield torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
'''


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "ours.py").write_text(LSTM)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flipproof", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


ASSESS = ("assess", "ours.py:Tagger", "--data", "ours.py:batches", "--output", "logits", "--trials", "6")


def test_an_lstm_with_dict_outputs(run, tmp_path):
    faults = ("--faults", "BitErrorRate([1e-3, 1e-2])")
    metrics = ("--metrics", "accuracy", "--metrics", "auroc")
    code, out, err = run(*ASSESS, *faults, *metrics, "--workers", "2", "--format", "Float16", "--out", "half")
    assert (code, err) == (0, "")
    values = 4 * 4 * (3 + 4) + 2 * 16 + 4 * 3 + 3
    assert f"6 tensors stored as Float16(): {16 * values:,} bits can be hit" in out
    assert max(map(len, out.splitlines())) <= 100
    assert {path.name for path in (tmp_path / "half").iterdir()} >= {
        *("journal.jsonl", "trials.csv", "summary.csv", "campaign.toml", "metric.png", "outcomes.png")
    }
    table = pd.read_csv("half/trials.csv")
    assert (len(table), {"ber", "accuracy", "auroc", "due"} <= set(table)) == (12, True)

    code, again, _ = run("assess", "--config", "half/campaign.toml", "--workers", "1")
    assert code == 0
    assert pd.read_csv("half/trials.csv").equals(table)  # resumed: nothing ran again, not even `seconds` changed
    assert again == out


def test_another_seed_is_refused_and_the_old_results_stay(run, tmp_path):
    faults = ("--faults", "RandomBits(2)")
    assert run(*ASSESS, *faults)[0] == 0
    before = (tmp_path / "flipproof-results" / "journal.jsonl").read_bytes()
    code, _, err = run(*ASSESS, *faults, "--seed", "5")
    assert code == 2
    assert "JournalMismatch" in err
    assert "seed" in err
    assert (tmp_path / "flipproof-results" / "journal.jsonl").read_bytes() == before


def test_torchvisions_resnet18_as_it_is(run):
    pytest.importorskip("torchvision")
    model = ("torchvision.models:resnet18(num_classes=3)", "--data", "ours.py:images")
    where = ("--where", "Parameters(['fc*', 'layer4*'])")
    formats = ("--format", "fc*=Float16", "--format", "*=Float32", *where)
    code, out, err = run("assess", *model, *formats, "--faults", "BitErrorRate([1e-6])", "--trials", "2")
    assert (code, err) == (0, "")
    assert "Float16" in out
    assert "Float32" in out


def test_weights_from_safetensors(run, tmp_path):
    model = flipproof.models.digits_cnn()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.fc2.bias[4] = 1.0  # always answers 4
    save_file(model.state_dict(), tmp_path / "four.safetensors")
    network = ("flipproof.models:digits_cnn", "--weights", "four.safetensors", "--data", "flipproof.datasets:digits")
    code, _, _ = run("assess", *network, "--faults", "BitPosition([0])", "--out", "four")
    assert code == 0
    golden = fp.Assessment.load("four/journal.jsonl").golden["accuracy"]
    targets = torch.cat([y for _, y in flipproof.datasets.digits()])
    assert golden == pytest.approx(float((targets == 4).float().mean()))


def test_shards_are_merged_to_one_campaign(run, tmp_path):
    faults = ("--faults", "BitErrorRate([1e-3, 1e-2])")
    for number in (1, 2):
        assert run(*ASSESS, *faults, "--shard", f"{number}/2", "--out", f"part{number}")[0] == 0
    parts = [f"part{number}/journal.jsonl" for number in (1, 2)]
    code, _, err = run("merge", "whole.jsonl", parts[0])
    assert code == 2
    assert "trials are missing: of point 0" in " ".join(err.split())
    code, out, err = run("merge", "whole.jsonl", *parts)
    assert (code, err) == (0, "")
    assert "Written to whole.jsonl" in out
    assert run(*ASSESS, *faults, "--out", "alone")[0] == 0
    drop = ["seconds"]
    alone, merged = (fp.Assessment.load(path) for path in ("alone/journal.jsonl", "whole.jsonl"))
    assert merged.trials.drop(columns=drop).equals(alone.trials.drop(columns=drop))
    assert run("merge", "other.jsonl", parts[0], "--partial")[0] == 0


def test_compare_names_gains(run, tmp_path):
    for seed in (0, 1):
        faults = ("--faults", "BitErrorRate([1e-3, 1e-2])", "--seed", seed, "--out", f"run{seed}")
        assert run(*ASSESS, *faults)[0] == 0
    written = ("--csv", "both.csv", "--figure", "both.png")
    code, out, err = run("compare", "one=run0/journal.jsonl", "two=run1/journal.jsonl", *written)
    assert (code, err) == (0, "")
    assert "ber 1e-2: accuracy gains" in out
    assert "independent draws" in out
    assert set(pd.read_csv("both.csv")["campaign"]) == {"one", "two"}
    assert (tmp_path / "both.png").stat().st_size > 1000
    code, out, _ = run("compare", "a=run0/journal.jsonl", "b=run0/journal.jsonl")
    assert "accuracy: no difference, it is the same campaign" in out
    code, out, _ = run("compare", "[bold]x=run0/journal.jsonl", "$y_1$=run1/journal.jsonl")
    assert code == 0
    assert "[bold]x" in out
    assert "$y_1$" in out
    assert run("compare", "a=run0/journal.jsonl", "a=run1/journal.jsonl")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("assess",), "command line: model, data, faults must be given"),
        ((*ASSESS, "--faults", "BitErrorRate(2)"), "command line: faults takes BitErrorRate([1e-6, 1e-5]), got"),
        ((*ASSESS, "--faults", "BitErrorRate(1e-3)", "--metrics", "f1"), "average_precision"),
        ((*ASSESS, "--faults", "BitErrorRate(1e-3)", "--where", "Parameters('conv*')"), "FaultSpaceError"),
        (("assess", "ours.py:nothing", "--data", "ours.py:batches", "--faults", "RandomBits(1)"), "has no 'nothing'"),
        ((*ASSESS[:4], "--faults", "RandomBits(1)"), "output="),
        ((*ASSESS, "--faults", "RandomBits(1)", "--format", "Float16", "--format", "head=Float32"), "PATTERN=FORMAT"),
        (("compare", "absent.jsonl"), "absent.jsonl"),
        (("reproduce", "no-such-paper"), "no paper is called 'no-such-paper'"),
    ],
)
def test_refusals_are_one_clear_message_and_status_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err.replace("\n", " ").replace("  ", " ")
    assert "Traceback" not in err


def test_list_and_version(run):
    code, out, _ = run("list")
    assert code == 0
    for name in (
        "Affine ",
        "BitErrorRate ",
        "Guard ",
        "ProAct.quick ",
        "Neurons ",
        "auroc",
        "flipproof.models:resnet18",
        "flipproof.datasets:digits",
    ):
        assert name in out
    assert run("--version")[1].strip() == f"flipproof {fp.__version__}"


def test_help_is_there_before_torch():
    code = "import sys\nfrom flipproof.cli import app\ntry:\n    app()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "False"
    assert all(f" {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert verb in out
    (options,) = re.findall(r"Options ─.*", out, re.DOTALL)
    assert "--help" in options


def test_an_unknown_verb_is_refused_with_a_likely_one(run):
    code, _, err = run("asess")
    assert code == 2
    assert "Did you mean 'assess'" in err


def test_help_teaches(run):
    code, out, _ = run("assess", "--help")
    assert code == 0
    for words in ("--faults", "BitErrorRate([1e-6, 1e-5])", "resume", "--config"):
        assert words in out


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines_not_tracebacks(run):
    code, _, err = run(*ASSESS, "--faults", "BitErrorRate([1e-9, 1e-3])")
    assert code == 0
    assert err.startswith("warning: ")
    assert ".py:" not in err


def test_as_a_program():
    command = [sys.executable, "-c", "from flipproof.cli import main; main()", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fault models" in done.stdout


def test_report_writes_one_page(run, tmp_path):
    assert run(*ASSESS, "--faults", "BitErrorRate([1e-2])", "--out", "one")[0] == 0
    code, out, err = run("report", "page.html", "ours=one/journal.jsonl")
    assert (code, out.strip(), err) == (0, "Written to page.html", "")
    assert "<h2>ours</h2>" in (tmp_path / "page.html").read_text()


def test_harden_then_assess_what_was_hardened(run, tmp_path):
    net = "flipproof.demo:trained_digits_cnn"
    code, out, err = run(
        "harden", net, "--data", "flipproof.datasets:digits('train')", "--method", "Guard()", "--out", "safe"
    )
    assert (code, err) == (0, "")
    assert "3 activations bounded" in out
    assert "the outputs of fc2 are guarded" in out
    assert (tmp_path / "safe" / "activations.csv").exists()
    faults = ("--faults", "BitErrorRate([1e-4])", "--format", "FixedPoint", "--trials", "20")
    data = ("--data", "flipproof.datasets:digits")
    for name, more in (("plain", ()), ("safe", ("--hardened", "safe/hardened.safetensors"))):
        assert run("assess", net, *data, *faults, *more, "--out", f"run-{name}")[0] == 0
    code, out, _ = run("compare", "plain=run-plain/journal.jsonl", "safe=run-safe/journal.jsonl")
    assert code == 0
    plain, safe = (fp.Assessment.load(f"run-{name}/journal.jsonl").summary["accuracy"][0] for name in ("plain", "safe"))
    assert safe > plain + 0.2


@pytest.mark.parametrize(
    ("method", "message"), [("Float32()", "Float32 is not among AVC"), ("Guard(per='row')", "per is 'layer'")]
)
def test_methods_that_are_none(run, method, message):
    code, _, err = run("harden", "ours.py:Tagger", "--data", "ours.py:batches", "--method", method)
    assert code == 2
    assert message in err


def test_explore_finds_widths_and_writes_what_it_tried(run, tmp_path):
    net = ("explore", "flipproof.demo:trained_digits_cnn", "--data", "flipproof.datasets:digits", "--trials", "5")
    thresholds = ("--accuracy", "0.9", "--drop", "0.5", "--faults", "BitErrorRate([1e-3])", "--bits", "3:4")
    code, out, err = run(*net, *thresholds, "--formats", "SECDED(Affine(bits=8))", "--out", "found")
    assert (code, err) == (0, "")
    assert "narrowest feasible: TripleMSB(inner=Affine(bits=3" in out
    assert "SECDED(Affine(bits=8))" in out
    assert max(map(len, out.splitlines())) <= 100
    table = pd.read_csv(tmp_path / "found" / "candidates.csv")
    assert table["width"].tolist() == [8, 5, 13]
    assert (tmp_path / "found" / "tradeoff.png").stat().st_size > 5000
    assert run(*net, *thresholds, "--faults", "RandomBits(3)")[0] == 2
    code, _, err = run(*net, "--accuracy", "0.9", "--drop", "0.5", "--bits", "3-4")
    assert code == 2
    assert "NARROWEST:WIDEST" in err


def test_assess_hits_neurons(run, tmp_path):
    net = ("assess", "flipproof.demo:trained_digits_cnn", "--data", "flipproof.datasets:digits", "--where")
    code, _, err = run(*net, "Neurons('conv*')", "--faults", "RandomBits(1)", "--trials", "3", "--out", "hit")
    assert (code, err) == (0, "")
    found = fp.Assessment.load(tmp_path / "hit" / "journal.jsonl")
    assert all(entry.name.startswith("conv") for entry in found.header.stored)
    assert "where = \"Neurons('conv*')\"" in (tmp_path / "hit" / "campaign.toml").read_text()
    before = (tmp_path / "hit" / "journal.jsonl").read_bytes()
    assert run("assess", "--config", "hit/campaign.toml")[0] == 0
    assert (tmp_path / "hit" / "journal.jsonl").read_bytes() == before
    code, _, err = run(*net, "Neurons(buffers=True)", "--faults", "RandomBits(1)", "--out", "other")
    assert code == 2
    assert "buffers" in err


MARKUP = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"[bold]x[/bold]": nn.Linear(4, 3), "[/red]": nn.Linear(4, 3)})

    def forward(self, x):
        return self.body["[bold]x[/bold]"](x) + self.body["[/red]"](x)

def batches():
    yield torch.ones(6, 4), torch.arange(6) % 3
"""


def test_names_with_brackets_are_printed_as_they_are(run, tmp_path):
    (tmp_path / "odd.py").write_text(MARKUP)
    net = ("assess", "odd.py:Odd", "--data", "odd.py:batches", "--faults", "RandomBits(1)", "--trials", "2")
    code, out, err = run(*net, "--where", "Parameters(exclude='*red*')", "--out", "o[bold]ut")
    assert (code, err) == (0, "")
    assert "outside the fault space: body.[/red].weight" in out
    assert "Written to o[bold]ut/:" in out
    code, _, err = run(*net, "--where", "fp.Parameters('[/red]x')", "--out", "other")
    assert code == 2
    assert "include=('[/red]x',)" in err
    assert "body.[bold]x[/bold].weight" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "f2"), "unknown metric 'f2': choose among accuracy, auroc, average_precision"),
        (("--device", "gpu"), "takes a device that is here, such as 'cpu' or 'cuda:0', got 'gpu'"),
        (("--cache-bytes", "-1"), "more bytes for cache_bytes=, got -1"),
        (("--margin", "2"), "confidence and margin in (0, 1)"),
        (("--trials", "0"), "trials ≥ 1"),
        (("--format", "deep.json"), "nested a few levels deep"),
        (("--format", "text.json"), "cannot be read as JSON"),
        (("--data", "builtins:int(3)"), "gives a int, expected batches"),
    ],
)
def test_values_that_are_none(run, tmp_path, options, message):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "text.json").write_bytes(b"\xff")
    code, out, err = run(*ASSESS, "--faults", "RandomBits(1)", *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "flipproof-results").exists()


def test_every_bit_shard_by_shard(run, tmp_path):
    every = ("inject-all", "ours.py:Tagger", "--data", "ours.py:batches", "--output", "logits", "--out", "bits")
    code, out, err = run(*every, "--where", "Parameters('head')", "--shard", "1/2")
    assert (code, err) == (0, "")
    assert "352 of 480 single flips (73.3 %) on 18 samples each" in out
    assert {path.name for path in (tmp_path / "bits").iterdir()} >= {
        *("journal.jsonl", "table.csv", "sites.csv", "bits.csv", "table.png", "inject_all.toml")
    }
    code, out, _ = run(*every, "--where", "Parameters('head')", "--shard", "2/2")
    assert code == 0
    found = fp.BitTable.load("bits/journal.jsonl")
    assert (found.done, len(found.table)) == (1.0, 64)
    assert found.total[["masked", "non_critical_sdc", "critical_sdc", "due"]].sum() == 480 * 18
    code, _, err = run(*every)
    assert code == 2
    assert "holds another bit table" in err
