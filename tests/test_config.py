from __future__ import annotations

import pytest
import torch

from flipproof.config import load_data, load_model, load_object, read_metrics, read_toml
from flipproof.errors import ConfigError


def test_objects_of_modules_and_files(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "import torch\nclass Nets:\n    def small(width=2):\n        return torch.nn.Linear(width, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_object("torch.nn:Linear") is torch.nn.Linear
    assert load_object("torch:nn.Linear(3, 4)").out_features == 4
    assert load_object("mynet:Nets.small(width=5)").in_features == 5
    assert load_object(f"{tmp_path}/mynet.py:Nets.small()").in_features == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch.nn", "expected MODULE:NAME"),
        (":Linear", "expected MODULE:NAME"),
        ("torch.nn:", "expected MODULE:NAME"),
        ("torch.nothing_here:x", "cannot import torch.nothing_here"),
        ("torch.nn:Nothing", "torch.nn has no 'Nothing'"),
        ("absent.py:net", "there is no file absent.py"),
        ("torch.nn:Linear(2)", "out_features"),
        ("torch.nn:Linear(in_features=open('x'), out_features=1)", "cannot read"),
    ],
)
def test_what_cannot_be_loaded_says_why(text, message):
    with pytest.raises(ConfigError, match=message):
        load_object(text)


@pytest.mark.parametrize("text", [".a:b", "..:x", ":x", "x:", "x"])
def test_a_place_that_is_none(text):
    with pytest.raises(ConfigError, match="expected MODULE:NAME or FILE"):
        load_object(text)


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        (load_model, "builtins:dict", "gives a dict, not a torch.nn.Module"),
        (load_model, "torch.nn:Linear", "Linear cannot be called without arguments"),
        (load_data, "builtins:int(3)", r"data 'builtins:int\(3\)' gives a int, expected batches"),
        (read_metrics, ["exactness"], "unknown metric 'exactness': choose among accuracy, auroc.*, or name a MODULE:F"),
        (read_metrics, ["torch.nn:absent"], "torch.nn has no 'absent'"),
    ],
)
def test_what_is_of_another_kind(read, given, message):
    with pytest.raises(ConfigError, match=message):
        read(given)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        read_toml(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("model = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        read_toml(tmp_path / "broken.toml")


@pytest.mark.parametrize("content", [b"= 3", b"\xff\xfe", b"a = " + b"[" * 5000])
def test_a_file_that_is_no_toml(tmp_path, content):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "c.toml")
