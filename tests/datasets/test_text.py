import pytest
import torch

from flipproof.datasets.text import sst2
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
