import pytest
import torch

from flipproof.datasets.text import sst2, tinyshakespeare
from flipproof.errors import DataError


def write(folder, train, dev):
    for name, rows in (("train", train), ("dev", dev)):
        (folder / f"sst2_{name}.tsv").write_text("label\tsentence\n" + "".join(f"{y}\t{s}\n" for y, s in rows))


def test_words_are_numbered_by_frequency(tmp_path):
    write(tmp_path, [(1, "good good film"), (0, 'a " bad film')], [(1, "good new")])
    (train, test) = sst2(tmp_path, words=4, length=3)
    assert train[0][0].tolist() == [[2, 2, 3], [1, 1, 1]]
    assert train[0][1].tolist() == [1, 0]
    assert test[0][0].tolist() == [[2, 1, 0]]
    assert test[0][0].dtype == torch.int64
    assert len(sst2(tmp_path, limit=1)[0][0][0]) == 1


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"sst2_train\.tsv"):
        sst2(tmp_path)
    write(tmp_path, [(1, "good"), (2, "odd")], [(1, "fine")])
    with pytest.raises(DataError, match=r"sst2_train\.tsv:3: expected 0 or 1"):
        sst2(tmp_path)


def plays(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tinyshakespeare.txt").write_bytes(text.encode() if isinstance(text, str) else text)


def test_windows_of_characters_and_what_follows(tmp_path):
    text = "abcdefghi" * 10 + "jihgfedcba"  # 100 characters, the last ten held out
    plays(tmp_path / "text", text)
    (x, y), (rest, _) = tinyshakespeare(tmp_path, context=3, stride=2, batch_size=3)
    assert x.tolist() == [[9, 8, 7], [7, 6, 5], [5, 4, 3]]
    assert y.tolist() == [6, 4, 2]
    assert rest.tolist() == [[3, 2, 1]]
    assert x.dtype == y.dtype == torch.int64
    ((x, y),) = tinyshakespeare(tmp_path, "train", context=4, stride=40, targets="all", limit=2)
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert y.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_no_window_reaches_into_the_held_out_part(tmp_path):
    plays(tmp_path, "a" * 90 + "b" * 10)
    for split, character in (("train", 0), ("test", 1)):
        for x, y in tinyshakespeare(tmp_path, split, context=4, stride=1):
            assert (x == character).all()
            assert (y == character).all()
    assert sum(len(x) for x, _ in tinyshakespeare(tmp_path, "train", context=4, stride=1)) == 86


def test_plays_that_are_absent_short_or_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no tinyshakespeare\.txt under"):
        tinyshakespeare(tmp_path)
    plays(tmp_path, "to be or not to be")
    with pytest.raises(DataError, match="its test part has 1 characters, no window of 64 and one more"):
        tinyshakespeare(tmp_path)
    plays(tmp_path, b"\xff\xfe" * 400)
    with pytest.raises(DataError, match="as UTF-8 text"):
        tinyshakespeare(tmp_path)
    for wrong in ({"context": 0}, {"stride": 0}, {"batch_size": 0}, {"limit": 0}):
        with pytest.raises(DataError, match="are at least 1"):
            tinyshakespeare(tmp_path, **wrong)
