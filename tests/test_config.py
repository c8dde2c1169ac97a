from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flipproof as fp
from flipproof.config import CampaignConfig, read_toml
from flipproof.errors import ConfigError

REQUIRED = {"model": "torch.nn:Linear(2, 3)", "data": "mine:batches", "faults": "RandomBits(2)"}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
CONFIGS = st.builds(
    CampaignConfig,
    model=TEXT,
    data=TEXT,
    faults=TEXT,
    format=st.none() | TEXT | st.dictionaries(TEXT, TEXT, min_size=1, max_size=3),
    weights=st.none() | TEXT,
    include=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    exclude=st.lists(TEXT, max_size=3).map(tuple),
    buffers=st.booleans(),
    trials=st.integers(1, 10**6),
    seed=st.integers(0, 2**40),
    margin=st.none() | st.floats(1e-6, 0.5),
    output=st.none() | TEXT | st.integers(-3, 3),
    cache_bytes=st.none() | st.integers(0, 2**40),
)


@given(CONFIGS)
def test_what_is_written_reads_back(config):
    assert CampaignConfig.from_mapping(tomllib.loads(config.to_toml()), source="test") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trails": 5}, "campaign.toml: unknown trails; known are model, data, faults"),
        ({"model": None}, "campaign.toml: model must be given"),
        ({"trials": "many"}, "trials takes int, got 'many'"),
        ({"trials": 2.5}, "trials takes int, got 2.5"),
        ({"trials": True}, "trials takes int, got True"),
        ({"buffers": 1}, "buffers takes bool, got 1"),
        ({"format": ["Float16"]}, r"format takes str \| dict\[str, str\] \| None, got"),
        ({"include": 3}, "include takes"),
    ],
)
def test_what_makes_no_sense_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        CampaignConfig.from_mapping({**REQUIRED, **change}, source="campaign.toml")


def test_whole_numbers_are_floats_too_and_one_pattern_needs_no_list():
    config = CampaignConfig.from_mapping({**REQUIRED, "margin": 1, "include": "fc*"}, source="test")
    assert (config.margin, config.include) == (1.0, ("fc*",))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        read_toml(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("model = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        read_toml(tmp_path / "broken.toml")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_for_config.py").write_text(
        "import torch\n"
        "def batches():\n"
        "    x = torch.arange(12.).reshape(6, 2) / 6 - 1\n"
        "    yield x, torch.arange(6) % 3\n"
        "def head(output):\n"
        "    return output[:, :3]\n"
    )
    monkeypatch.chdir(tmp_path)
    return {**REQUIRED, "data": "mine_for_config:batches", "trials": 4}


def test_running_is_assess_and_writes_what_repeats_it(tmp_path, mine):
    config = CampaignConfig.from_mapping({**mine, "format": {"weight": "Float16"}, "out": "first"}, source="test")
    first = config.run(progress=False)
    assert sorted(path.name for path in (tmp_path / "first").iterdir() if path.suffix != ".lock") == [
        "campaign.toml",
        "journal.jsonl",
        "summary.csv",
        "trials.csv",
    ]
    again = CampaignConfig.from_mapping({**read_toml("first/campaign.toml"), "out": "second"}, source="file")
    columns = [name for name in first.trials if name != "seconds"]
    second = again.run(progress=False)
    assert first.trials[columns].equals(second.trials[columns])
    assert fp.Assessment.load("first/journal.jsonl").summary.equals(first.summary)


def test_outputs_by_function(mine):
    runs = [
        CampaignConfig.from_mapping({**mine, **change}, source="test").run(progress=False).golden
        for change in ({"out": "all"}, {"out": "head", "output": "mine_for_config:head"})
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "builtins:dict"}, "gives a dict, not a torch.nn.Module"),
        ({"model": "torch.nn:Linear"}, "Linear cannot be called without arguments"),
        ({"weights": "absent.safetensors"}, "cannot read weights from absent.safetensors"),
        ({"metrics": ["exactness"]}, "unknown metric .exactness.: choose among"),
        ({"format": "Float12"}, "Float12 is not among"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, mine, change, message):
    with pytest.raises(ConfigError, match=message):
        CampaignConfig.from_mapping({**mine, **change, "out": "results"}, source="test").run(progress=False)
    assert not (tmp_path / "results").exists()
