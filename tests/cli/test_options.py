from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flipproof as fp
from flipproof.cli._options import Given, arguments, effective, options_of, written
from flipproof.config import read_toml
from flipproof.errors import ConfigError
from flipproof.running.data import Data
from flipproof.spaces.sites import Neurons, Parameters

OPTIONS = options_of(fp.assess)
REQUIRED = {"model": "torch.nn:Linear(2, 3)", "data": "mine:batches", "faults": "RandomBits(2)"}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
CONFIGS = st.fixed_dictionaries(
    {"model": TEXT, "data": TEXT, "faults": TEXT},
    optional={
        "format": st.lists(TEXT, min_size=1) | st.dictionaries(TEXT, TEXT, min_size=1, max_size=3),
        "where": TEXT,
        "trials": st.integers(1, 10**6),
        "seed": st.integers(0, 2**40),
        "margin": st.floats(1e-6, 0.5),
        "output": TEXT | st.integers(-3, 3),
        "cache_bytes": st.integers(0, 2**40),
        "progress": st.booleans(),
    },
)


@given(CONFIGS)
def test_what_is_written_reads_back(config):
    given = effective(OPTIONS, ("command line", config))
    again = effective(OPTIONS, ("file", tomllib.loads(written("assess", OPTIONS, given))))
    was = {name: one.value for name, one in given.items()}
    assert was.items() <= {name: one.value for name, one in again.items()}.items()
    assert again["confidence"].value == 0.95  # a plain default is written too
    assert {name: one.value for name, one in again.items() if name not in was} == {
        name: OPTIONS[name].default for name in again if name not in was
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trails": 5}, "campaign.toml: unknown trails; known are model, data, faults"),
        ({"model": None}, "campaign.toml and command line: model must be given"),
        ({"trials": "many"}, "campaign.toml: trials takes a whole number, got 'many'"),
        ({"trials": 2.5}, "trials takes a whole number, got 2.5"),
        ({"trials": True}, "trials takes a whole number, got True"),
        ({"progress": 1}, "progress takes true or false, got 1"),
        ({"format": 3}, r"format takes texts or a table {pattern: text}, got 3"),
        ({"metrics": 3}, "metrics takes texts"),
        ({"format": {"a": 1}}, r"format takes texts or a table {pattern: text}, got {'a': 1}"),
        ({"margin": 10**400}, "margin takes a number"),
    ],
)
def test_what_makes_no_sense_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        effective(OPTIONS, ("campaign.toml", {**REQUIRED, **change}), ("command line", {}))


def test_whole_numbers_are_floats_too_and_one_text_needs_no_list():
    found = effective(OPTIONS, ("test", {**REQUIRED, "margin": 1, "metrics": "auroc"}))
    assert (found["margin"].value, found["metrics"].value) == (1.0, ["auroc"])


def test_the_command_line_wins_and_errors_say_which_of_both_it_was():
    file, typed = {**REQUIRED, "trials": 5, "seed": 3}, {"trials": 7, "seed": None, "faults": "BitErrorRate(2)"}
    found = effective(OPTIONS, ("campaign.toml", file), ("command line", typed))
    assert list(found) == ["model", "data", "faults", "trials", "seed"]
    assert (found["trials"], found["seed"]) == (Given(7, "command line"), Given(3, "campaign.toml"))
    for name, message in (
        (
            "model",
            r"campaign.toml: model takes MODULE:FACTORY or FILE.py:FACTORY, got 'torch.nn:Nothing': torch.nn has",
        ),
        ("faults", r"command line: faults takes BitErrorRate\(\[1e-6, 1e-5\]\), got 'BitErrorRate\(2\)': .* got 2"),
    ):
        wrong = {**found, "model": Given("torch.nn:Nothing", "campaign.toml")}
        with pytest.raises(ConfigError, match=message):
            arguments(OPTIONS, {name: wrong[name]})


def paint(
    model: nn.Module,
    data: Data,
    where: Parameters | Neurons | None = None,
    *,
    coats: int = 2,
    colours: Callable[[], None] | None = None,
    widths: tuple[int, int] = (3, 8),
    shine: bool = False,
) -> dict[str, Any]:
    """A verb that was never heard of.

    Args:
        model: what is painted.
        data: what it answers.
        where: which parts; all by default.
        coats: how many.
        colours: cannot be written as text.
        widths: of the brush.
        shine: whether it is varnished. Twice.
    """
    return {"where": where, "coats": coats, "widths": widths, "shine": shine}


def test_a_verb_declares_its_options_by_signature_and_docstring(mine):
    options = options_of(paint)
    assert list(options) == ["model", "data", "where", "coats", "widths", "shine"]
    assert {name: option.help for name, option in options.items()}["shine"] == "whether it is varnished"
    given = {**REQUIRED, "data": mine["data"], "where": "Neurons(include='a*')", "widths": "2:4", "shine": True}
    del given["faults"]
    found = paint(**arguments(options, effective(options, ("test", given))))
    assert found == {"where": fp.Neurons("a*"), "coats": 2, "widths": (2, 4), "shine": True}
    with pytest.raises(ConfigError, match=r"expected NARROWEST:WIDEST, e.g. 3:8, got '3-8'"):
        arguments(options, {"widths": Given("3-8", "test")})
    with pytest.raises(ConfigError, match="Everything is not among Cache, Neurons, Parameters"):
        arguments(options, {"where": Given("Everything()", "test")})


PYTHON_ONLY = {"explore": {"protect"}, "harden": {"given"}, "overhead": {"inputs"}}
"""Parameters for which no text stands; `given` is data and method, which also have names."""


@pytest.mark.parametrize(
    "verb",
    [
        *(fp.assess, fp.analyze, fp.estimate_factors, fp.estimate_rates, fp.inject_all, fp.harden, fp.explore),
        *(fp.explore_mixed, fp.pack_, fp.scrub_, fp.choose_clipping, fp.bit_profile, fp.overhead),
    ],
)
def test_every_verb_can_be_called_from_text(verb):
    options, parameters = options_of(verb), inspect.signature(verb).parameters
    assert parameters.keys() - options.keys() - {"client"} == PYTHON_ONLY.get(verb.__name__, set())  # it is --cluster
    assert all(option.help for option in options.values())
    assert options["model"].required


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


def run(given: dict[str, Any]) -> fp.Assessment:
    return fp.assess(**arguments(OPTIONS, effective(OPTIONS, ("test", given))), progress=False)


def test_a_file_repeats_a_run(tmp_path, mine):
    given = {**mine, "format": {"weight": "Float16"}}
    first = run(given)
    (tmp_path / "campaign.toml").write_text(written("assess", OPTIONS, effective(OPTIONS, ("test", given))))
    second = run(read_toml(tmp_path / "campaign.toml"))
    columns = [name for name in first.trials if name != "seconds"]
    assert first.trials[columns].equals(second.trials[columns])


def test_outputs_by_function(mine):
    assert run(mine).golden == run({**mine, "output": "mine_for_config:head"}).golden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["mine_for_config:absent"]}, "mine_for_config has no 'absent'"),
        ({"where": "Float32()"}, "Float32 is not among"),
        ({"format": "Float12"}, "Float12 is not among"),
        ({"faults": "Float32()"}, "Float32 is not among"),
    ],
)
def test_bad_input_is_refused(mine, change, message):
    with pytest.raises(ConfigError, match=message):
        run({**mine, **change})
