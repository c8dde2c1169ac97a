"""README and CONTRIBUTING do what they say: their Python runs as it stands there, their links and commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer import Context
from typer.main import get_command

from flipproof.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "docs/honest-numbers.md",
    "docs/cluster.md",
    "docs/compatibility.md",
    "docs/results/trained/README.md",
    "docs/recurrent.md",
    "docs/quantised.md",
    "docs/transformers.md",
    "docs/architecture.md",
    "docs/references.md",
    "docs/formats.md",
    "docs/deployment.md",
)


def python_in(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def in_a_fresh_process(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder)])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_example_runs_and_resumes(tmp_path):
    (example,) = python_in("README.md")
    assert len([line for line in example.splitlines() if line and not line.startswith("import")]) <= 12
    (tmp_path / "example.py").write_text(example)
    first = in_a_fresh_process(tmp_path, "-W", "error", "example.py")
    assert "critical_total" in first
    journals = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.jsonl")}
    assert len(journals) == 2
    assert (tmp_path / "report.html").exists()
    assert in_a_fresh_process(tmp_path, "-W", "error", "example.py") == first
    assert {path: path.read_bytes() for path in journals} == journals  # every trial was there already


def test_the_page_on_quantised_models_runs(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed (flipproof[quant])")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (flipproof[onnx])")
    (tmp_path / "example.py").write_text("".join(python_in("docs/quantised.md")))
    said = in_a_fresh_process(tmp_path, "example.py")
    for word in ("0.weight.qdata", "zero_point", "Float32()", "coverage", "coded"):
        assert word in said


def test_the_transformers_page_runs(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(python_in("docs/transformers.md")))
    said = in_a_fresh_process(tmp_path, "-W", "error", "page.py")
    assert "activations bounded" in said
    assert "prefill 294912" in said


def write_contributings_files(folder: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(files) == len(python_in("CONTRIBUTING.md"))
    for name, content in files:
        (folder / name).write_text(content)


def test_contributings_files_pass_the_contracts(tmp_path):
    write_contributings_files(tmp_path)
    out = in_a_fresh_process(tmp_path, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", ".")
    (passed,) = re.findall(r"(\d+) passed", out)
    assert int(passed) > 2 * 10


EXPORTED = """
from bursts import Burst
from constants import Constants
from flipproof import faults, formats, spaces
from flipproof.cli import app
from flipproof.hardening import methods
from power_of_two import PowerOfTwo
from share import Share

for package, thing in ((formats, PowerOfTwo), (spaces, Constants), (faults, Burst), (methods, Share)):
    setattr(package, thing.__name__, thing)
    package.__all__.append(thing.__name__)
given = ["--data", "given.py:data", "--faults", "Burst([2, 4])", "--trials", "3"]
for command in (
    ["list"],
    ["assess", "given.py:net", *given, "--format", "PowerOfTwo(bits=3)", "--out", "stored"],
    ["assess", "given.py:Scaled", *given, "--where", "Constants('scale')", "--out", "constants"],
    ["harden", "given.py:net", "--data", "given.py:data", "--method", "Share(0.9)"],
):
    app(command, standalone_mode=False)
"""
"""What one line in each package's `__init__.py` does, and then the command line."""

GIVEN = """
import torch
from test_constants import Scaled

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

def data():
    return [(torch.linspace(-1, 1, 240).reshape(80, 3), torch.arange(80) % 2)]
"""


def test_contributings_files_need_one_export_line(tmp_path):
    write_contributings_files(tmp_path)
    (tmp_path / "exported.py").write_text(EXPORTED)
    (tmp_path / "given.py").write_text(GIVEN)
    said = in_a_fresh_process(tmp_path, "exported.py")
    for name in ("PowerOfTwo", "Constants", "Burst", "Share"):
        assert re.search(rf"^  {name} +\S", said, re.MULTILINE), name
    for line in ("stored as PowerOfTwo(bits=3)", "64 bits can be hit", "1 activation"):
        assert line in said


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_commands_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^flipproof (\w+)", text, re.MULTILINE))
    group = get_command(app)
    commands = {name: group.resolve_command(Context(group), [name])[1] for name in group.commands}
    assert verbs
    assert verbs <= set(commands)
    options = {name for command in commands.values() for parameter in command.params for name in parameter.opts}
    assert set(re.findall(r" (--[a-z-]+)", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)))) <= options
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_test_that_a_rule_rests_on_exists():
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(\w+)`",
        (ROOT / "docs/honest-numbers.md").read_text(encoding="utf-8"),
    )
    assert len(named) > 20
    for path, name in named:
        assert re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, name)
