"""README and CONTRIBUTING do what they say: their Python runs as it stands there, their links and commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from flipproof.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "docs/honest-numbers.md",
    "docs/recurrent.md",
    "docs/architecture.md",
    "docs/references.md",
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


def test_contributings_files_pass_the_contracts(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(files) == len(python_in("CONTRIBUTING.md"))
    for name, content in files:
        (tmp_path / name).write_text(content)
    out = in_a_fresh_process(tmp_path, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", ".")
    (passed,) = re.findall(r"(\d+) passed", out)
    assert int(passed) > 2 * 10


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_commands_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^flipproof (\w+)", text, re.MULTILINE))
    commands = get_command(app).commands
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
