"""What an import costs: `import flipproof` nothing, reading a journal no torch."""

from __future__ import annotations

import subprocess
import sys
import time

import flipproof as fp

HEAVY = "torch numba pandas scipy sklearn matplotlib plotly rich torchmetrics transformers typer"


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Which heavy libraries a fresh process has loaded after some code."""
    code = f"import sys\n{code}\nprint(*(name for name in {HEAVY.split()!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def test_heavy_libraries_are_loaded_when_they_are_used():
    assert loaded_after("import flipproof") == set()
    assert not {"pandas", "sklearn"} & loaded_after("import flipproof as fp; fp.BitErrorRate([1e-3]), fp.Affine(8)")
    drawing = {"matplotlib", "plotly", "rich", "torchmetrics", "transformers", "sklearn", "typer"}
    assert not drawing & loaded_after("import flipproof as fp; fp.assess, fp.harden, fp.analyze, fp.explore, fp.pack_")


def test_a_journal_is_read_and_reported_without_torch(mlp, blobs, tmp_path):
    journal = tmp_path / "journal.jsonl"
    fp.assess(mlp, blobs, faults=fp.BitErrorRate([1e-2, 1e-1]), trials=4, journal=journal)
    read = "import flipproof as fp\nfound = fp.Assessment.load(sys.argv[1])\nfound.summary, found.trials"
    assert not {"torch", "numba", "matplotlib", "plotly", "rich"} & loaded_after(read, str(journal))
    assert "torch" not in loaded_after(f"{read}\nfp.compare(a=found, b=found)", str(journal))
    page = str(tmp_path / "page.html")
    report = loaded_after(f"{read}\nfp.report(sys.argv[2], a=found, b=found)", str(journal), page)
    assert "plotly" in report
    assert not {"torch", "matplotlib"} & report
    code = f"{read}\nprint(*(name for name in sys.modules if name.startswith('flipproof.engine.')))"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}", str(journal)], capture_output=True, text=True)
    assert done.stdout.split() == ["flipproof.engine.journal"]


def test_importing_flipproof_takes_no_longer_than_torch():
    """The least of three each, in turn: ≤ 1.15 × `import torch`. It is a hundredth, so load cannot turn this around."""
    seconds: dict[str, list[float]] = {"import torch": [], "import flipproof": []}
    for _ in range(3):
        for code, taken in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken.append(time.perf_counter() - began)
    assert min(seconds["import flipproof"]) <= 1.15 * min(seconds["import torch"])


def test_every_name_comes_from_one_list():
    namespace: dict[str, object] = {}
    exec("from flipproof import *", namespace)
    assert set(fp.__all__) <= namespace.keys()
    assert set(fp.__all__) <= set(dir(fp))
    assert fp.formats.Float64().width == 64
