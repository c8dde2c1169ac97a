"""An analysis done in jobs: killed and resumed, spread over processes, in any order, it finds the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from killed_analysis import VERBS, Deep, samples
from torch import Tensor, nn

import flipproof as fp
from flipproof.analysis._module_jobs import AnalysisHeader
from flipproof.analysis.deepvigor import KIND
from flipproof.analysis.layer_vulnerability import ModuleVulnerability
from flipproof.analysis.opened_model import opened
from flipproof.engine.journal import Journal
from flipproof.errors import ConfigError, JournalError, JournalMismatch, ModelError

PATIENCE = 180.0


@pytest.fixture(autouse=True)
def few_inputs_say_little() -> None:
    warnings.filterwarnings("ignore", message=".*inputs do not say more about their population.*")


class Small(nn.Module):
    """A convolution with a bias, BatchNorm, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.twice, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(12, 1, 4, 4), torch.zeros(12)) for _ in range(2)]


def tables(found: fp.VulnerabilityMap) -> list[pd.DataFrame]:
    return [found.layers, found.neurons, found.bits, found.ranges]


def same(one: list[pd.DataFrame], other: list[pd.DataFrame]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


@pytest.mark.parametrize("where", [fp.Neurons(), fp.Parameters()])
def test_workers_and_journals_change_nothing_that_analyze_finds(tmp_path, where):
    method = fp.DeepVigor(neurons=4)
    alone = tables(fp.analyze(Small().eval(), data(), method, where=where))
    for workers in (1, 2):
        path = tmp_path / f"{workers}.jsonl"
        same(tables(fp.analyze(Small().eval(), data(), method, where=where, workers=workers, journal=path)), alone)
        written = path.read_bytes()
        same(tables(fp.analyze(Small().eval(), data(), method, where=where, journal=path)), alone)
        assert path.read_bytes() == written  # all was there: nothing was done again


@pytest.mark.parametrize("by", ["search", "injection"])
def test_workers_and_journals_change_nothing_that_estimate_factors_finds(tmp_path, by):
    options = {"margin": 0.15, "by": by, "where": fp.Parameters("*t*")}
    alone = fp.estimate_factors(Small().eval(), data(), **options)
    for workers in (1, 2):
        path = tmp_path / f"{workers}.jsonl"
        for _ in range(2):
            found = fp.estimate_factors(Small().eval(), data(), workers=workers, journal=path, **options)
            same([found], [alone])
            assert found.attrs == alone.attrs


def test_more_inputs_are_a_round_of_jobs_of_their_own(tmp_path):
    torch.manual_seed(5)
    many = [(torch.randn(600, 1, 4, 4), torch.zeros(600))]
    path = tmp_path / "rounds.jsonl"
    options = {"margin": 0.01, "where": fp.Neurons("twice")}
    alone = fp.estimate_factors(Small().eval(), many, **options)
    same([fp.estimate_factors(Small().eval(), many, journal=path, **options)], [alone])
    lines = path.read_text().splitlines()
    assert len(lines) > 2  # 128 inputs did not say enough
    path.write_text("\n".join(lines[:2]) + "\n")
    same([fp.estimate_factors(Small().eval(), many, journal=path, **options)], [alone])
    assert path.read_text().splitlines() == lines


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[pd.DataFrame]]:
    return {name: verb(None) for name, verb in VERBS.items()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("verb", list(VERBS))
def test_kill_dash_nine_and_the_same_call_again_give_the_same_tables(tmp_path, uninterrupted, verb, workers):
    path = tmp_path / "journal.jsonl"
    program = f"import killed_analysis; killed_analysis.VERBS[{verb!r}]({str(path)!r}, {workers})"
    running = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program], cwd=Path(__file__).parent, start_new_session=True
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not path.exists() or path.read_bytes().count(b"\n") < 3:  # a header and two modules
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait(PATIENCE) == -signal.SIGKILL
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 7
    same(VERBS[verb](str(path)), uninterrupted[verb])
    assert path.read_bytes().startswith(kept)  # what was finished was not done again
    assert path.read_bytes().count(b"\n") == 7


def test_jobs_find_and_cost_the_same_in_any_order(tmp_path):
    """A weight and its bias share what was recorded for their layer; modules share nothing."""
    options = {"margin": 0.2, "where": fp.Parameters()}
    path = tmp_path / "journal.jsonl"
    whole = fp.estimate_factors(Small().eval(), data(), journal=path, **options)
    lines = path.read_text().splitlines()
    for kept in lines[1:]:  # each module alone is known, and all others are done in one go
        path.write_text(f"{lines[0]}\n{kept}\n")
        same([fp.estimate_factors(Small().eval(), data(), journal=path, **options)], [whole])


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"method": fp.DeepVigor(neurons=3)}, "method: "),
        ({"format": fp.Float16()}, "sites: "),
        ({"where": fp.Neurons(exclude="last")}, "where: "),
    ],
)
def test_another_analysis_is_refused_field_by_field(tmp_path, change, differs):
    path = tmp_path / "journal.jsonl"
    settings = {"method": fp.DeepVigor(neurons=2), "journal": path}
    fp.analyze(Small().eval(), data(), **settings)
    written = path.read_bytes()
    with pytest.raises(JournalMismatch, match=differs):
        fp.analyze(Small().eval(), data(), **{**settings, **change})
    assert path.read_bytes() == written


def test_another_model_and_other_data_are_refused(tmp_path):
    path, method = tmp_path / "journal.jsonl", fp.DeepVigor(neurons=2)
    fp.analyze(Small().eval(), data(), method, journal=path)
    other = Small().eval()
    with torch.no_grad():
        other.last.bias[0] += 1e-6
    with pytest.raises(JournalMismatch, match="weights: "):
        fp.analyze(other, data(), method, journal=path)
    with pytest.raises(JournalMismatch, match="data: "):
        fp.analyze(Small().eval(), data()[:1], method, journal=path)


def test_the_journal_of_one_verb_is_refused_by_another(tmp_path):
    path = tmp_path / "journal.jsonl"
    fp.analyze(Small().eval(), data(), fp.DeepVigor(neurons=2), journal=path)
    with pytest.raises(JournalError, match="the journal of a vulnerability analysis, expected that of a factor"):
        fp.estimate_factors(Small().eval(), data(), margin=0.2, journal=path)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"width":32', '"width":31'), ('"probes":', '"rows":'), ('"dtype":"int32"', '"dtype":"object"')],
)
def test_a_damaged_record_is_refused_with_its_line(tmp_path, old, new):
    path, method = tmp_path / "journal.jsonl", fp.DeepVigor(neurons=2)
    fp.analyze(Small().eval(), data(), method, journal=path)
    lines = path.read_text().splitlines()
    assert old in lines[2]
    path.write_text("\n".join([*lines[:2], lines[2].replace(old, new, 1), *lines[3:]]) + "\n")
    with pytest.raises(JournalError, match=r"line 3: not a record of a vulnerability analysis"):
        fp.analyze(Small().eval(), data(), method, journal=path)


def test_a_journal_holds_the_sums_bit_by_bit(tmp_path):
    path = tmp_path / "journal.jsonl"
    found = fp.analyze(Small().eval(), data(), fp.DeepVigor(neurons=4), journal=path)
    header, records = Journal(path, AnalysisHeader, ModuleVulnerability, kind=KIND).read()
    assert header.fingerprint["method"] == repr(fp.DeepVigor(neurons=4))
    sites = [site for record in records for site in record.sites]
    assert [record.module for record in records] == ["conv", "twice", "last"]
    assert sorted(site.name for site in sites) == sorted(layer.name for layer in found.layers_found)
    for site in sites:
        for name, sums in found.layer(site.name).tensors().items():
            assert torch.equal(getattr(site, name), sums)
        assert site.plain() == found.layer(site.name).plain()


class Writer(Deep):
    """Keeps the largest value it ever saw, once it sees something huge."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if float(x.abs().nan_to_num().max()) > 1e6:
                self.seen += 1
        return x


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_found_while_the_model_writes_into_itself_is_not_recorded(tmp_path, workers):
    path = tmp_path / "journal.jsonl"
    net = Writer()
    with pytest.raises(ModelError, match="the model writes seen under some error"):
        fp.analyze(net, samples(), journal=path, workers=workers)
    assert path.read_bytes().count(b"\n") == 1
    assert float(net.seen) == 0


@pytest.mark.parametrize("verb", [fp.analyze, fp.estimate_factors])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "takes a whole number ≥ 1 for workers=, got 0"),
        ({"workers": True}, "takes a whole number ≥ 1 for workers=, got True"),
        ({"journal": 3}, "takes the path of a journal for journal=, got 3"),
        ({"device": "nowhere"}, "device= takes a device that is here"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(verb, options, message):
    with pytest.raises(ConfigError, match=message):
        verb(Small().eval(), data(), **options)


def test_progress_names_the_modules(capsys):
    fp.analyze(Small().eval(), data(), fp.DeepVigor(neurons=2), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_model_on_another_device_is_not_given_to_workers():
    with opened(Small().eval(), data(), fp.Neurons(), None, None, 2**24, device="cpu") as prober:
        assert prober.device == torch.device("cpu")
        assert not prober.multiplications_behind("last")


def test_a_record_that_lost_a_site_is_refused(tmp_path):
    analysis, factors = tmp_path / "analysis.jsonl", tmp_path / "factors.jsonl"
    method = fp.DeepVigor(neurons=2)
    verbs = {
        analysis: lambda: fp.analyze(Small().eval(), data(), method, journal=analysis),
        factors: lambda: fp.estimate_factors(Small().eval(), data(), margin=0.2, journal=factors),
    }
    for path, verb in verbs.items():
        verb()
        lines = path.read_text().splitlines()
        record = json.loads(lines[1])
        record["sites" if path is analysis else "rows"] = []
        path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
        with pytest.raises(JournalError, match=rf"{path.name}: the line of the module of .* does not hold it"):
            verb()
