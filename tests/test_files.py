from __future__ import annotations

import os

import pytest

from flipproof._files import replacing
from flipproof.errors import ConfigError


def test_a_file_is_replaced_whole(tmp_path):
    page = tmp_path / "runs" / "page.html"
    for content in ("first", "second"):
        with replacing(page) as temporary:
            temporary.write_text(content)
            assert temporary.parent == page.parent
        assert page.read_text() == content
        assert list(page.parent.iterdir()) == [page]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(page) as temporary:
        print(temporary.write_text("half") // 0)
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_a_place_that_takes_no_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "page.html", "/proc/page.html"):
        with pytest.raises(ConfigError, match=r"cannot write .*page\.html"), replacing(path) as temporary:
            temporary.write_text("page")


def test_what_is_no_file_stays_and_links_are_followed(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with replacing(tmp_path / "link.txt") as target:
        target.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="it is no file"), replacing(path) as target:
            target.write_text("new")
    assert not (tmp_path / "pipe").is_file()
