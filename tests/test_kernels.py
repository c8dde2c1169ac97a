"""Compiled kernels work where nothing can be cached: a read-only installation, an account without a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import flipproof as fp
from flipproof.faults.sampling import TrialGenerator

SOURCE = Path(fp.__file__).parent
CHECK = """
import flipproof
from flipproof.faults.sampling import TrialGenerator, _below
print(flipproof.__file__)
print(TrialGenerator(7, "point", 0).below(1000, 4).tolist(), type(_below._cache).__name__)
"""


def run(package: Path, blocked: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG", "PYTHON"))}
    changed = {"HOME": str(blocked), "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", CHECK], env=kept | changed, capture_output=True, text=True, check=False, timeout=240
    )


def copied_where_nothing_can_be_written(folder: Path) -> Path:
    """The package with a plain file in the place of every folder that a cache could be made in.

    Even root cannot make a folder below a file, which permissions alone would let it do.
    """
    package = folder / "site" / "flipproof"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for place in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (place / "__pycache__").touch()
    return package


def test_without_any_place_for_a_cache(tmp_path):
    package = copied_where_nothing_can_be_written(tmp_path)
    blocked = tmp_path / "file"
    blocked.touch()
    done = run(package.parent, blocked)
    assert done.returncode == 0, done.stderr
    drawn = TrialGenerator(7, "point", 0).below(1000, 4).tolist()
    assert done.stdout.splitlines() == [str(package / "__init__.py"), f"{drawn} NullCache"]
