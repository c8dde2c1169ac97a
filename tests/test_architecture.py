"""The house is as docs/architecture.md says: its tree, its arrows, its sources."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "flipproof"


def test_imports_point_one_way(monkeypatch, capsys):
    """Layers, no circle, private modules: the contracts in pyproject.toml. Late and typing-only imports count too."""
    pytest.importorskip("importlinter", reason="needs import-linter, which the dev extra installs")
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "src"))
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def tree_in_the_document() -> dict[str, set[str]]:
    """Folder → names of its modules, as the tree of docs/architecture.md has them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```text\nsrc/flipproof/\n(.*?)```", text, re.DOTALL)
    assert block is not None
    found: dict[str, set[str]] = {}
    folder = ""
    for line in block.group(1).splitlines():
        head = re.match(r" {2}([a-z_/]+/|\(top\)) +", line)
        if head:
            folder = "" if head.group(1) == "(top)" else head.group(1).rstrip("/")
            found.setdefault(folder, set())
            line = line[head.end() :]
        names = line.split(" · ")[0] if " · " in line else line
        found[folder] |= set(re.findall(r"[a-z_0-9]+", names.split("—")[0]))
    return found


def test_the_tree_is_the_real_one():
    real: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        folder = "" if place.parent == Path() else place.parent.as_posix()
        real.setdefault(folder, set())
        if path.stem not in ("__init__", "__main__"):
            real[folder].add(path.stem)
    assert tree_in_the_document() == real


def test_every_citation_has_its_entry():
    entries = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| ([^|]+?) \|", entries, re.MULTILINE))
    cited = re.compile(r"\b[A-Z][A-Za-z-]+ (?:et al\.|and [A-Z][a-z]+) (?:19|20)\d\d\b")
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert set(cited.findall(text)) <= known, path
        assert not re.search(r"\bPAPERS\b(?!\[| =|\)| =)|DESIGN\b", text) or "_reproduce" in path.name, path


def test_nothing_is_imported_from_a_private_module_outside_its_package():
    """Also by tests and benchmarks of other rooms: a name that many need is public."""
    for folder in ("benchmarks",):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"from flipproof\.[a-z_.]*\._", path.read_text(encoding="utf-8")), path


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the package needs 3.11")
def test_the_five_walks_name_functions_that_exist():
    import importlib

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = text.split("## The five walks")[1].split("\n## ")[0]
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+)\.py: ([A-Za-z_.]+)`", walks)
    assert len(named) >= 25
    for place, name in named:
        found = importlib.import_module(f"flipproof.{place.replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)
