from __future__ import annotations

import pytest

from flipproof._files import replacing


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


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), replacing(tmp_path / "file" / "page.html") as temporary:
        temporary.touch()
