"""Work on a cluster: the records of one process, whatever becomes of workers, scheduler and driver on the way."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.engine import cluster
from flipproof.errors import ConfigError, FlipproofWarning, InfrastructureError

distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

SOURCE = Path(fp.__file__).parents[1]
LONG = pytest.mark.skipif("CLUSTER" not in os.environ, reason="`make cluster` runs it: it takes half a minute")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3)
        self.register_buffer("first", self.a.weight.detach()[:2])  # shares memory with a parameter

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.first.sum() * 1e-3


def samples(count=40):
    torch.manual_seed(2)
    return [(torch.randn(count, 6), torch.arange(count) % 3), (torch.randn(9, 6), torch.arange(9) % 3)]


SETUP = {"faults": fp.BitErrorRate([1e-3, 1e-2]), "trials": 40, "seed": 3, "progress": False}


def elsewhere():
    """Whether a thread of a pool runs this, and not the test."""
    return threading.current_thread() is not threading.main_thread()


def rows(result):
    return result.trials.drop(columns="seconds")


@pytest.fixture(scope="module")
def dask():
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as executor:
        yield executor


# the same records


def test_a_local_cluster_changes_no_record(dask, tmp_path):
    net, data = Net(), samples()
    upsets = {"where": fp.Neurons(), "faults": fp.RandomBits(1)}
    for change in ({}, upsets, {"format": fp.SECDED(fp.Affine(8))}, {"margin": 0.05}, {"audit": 1.0}):
        expected = fp.assess(net, data, **SETUP | change)
        found = fp.assess(
            net, data, **SETUP | change, client=dask, journal=tmp_path / f"{len(change)}{[*change]}.jsonl"
        )
        pd.testing.assert_frame_equal(rows(found), rows(expected), check_exact=True)
    again = fp.assess(net, data, **SETUP, client=dask, journal=tmp_path / "0[].jsonl")  # nothing is left to be done
    pd.testing.assert_frame_equal(rows(again), rows(fp.assess(net, data, **SETUP)), check_exact=True)


def test_every_long_verb_takes_a_client(dask, tmp_path):
    net, data = Net(), samples()
    with torch.no_grad():
        data = [(x, net(x).argmax(dim=1)) for x, _ in data]
    here, there = fp.analyze(net, data, fp.DeepVigor()), fp.analyze(net, data, fp.DeepVigor(), client=dask)
    pd.testing.assert_frame_equal(here.ranges, there.ranges)
    pd.testing.assert_frame_equal(
        fp.estimate_factors(net, data, margin=0.1, client=dask), fp.estimate_factors(net, data, margin=0.1)
    )
    search = {"accuracy": 0.5, "drop": 0.3, "faults": fp.BitErrorRate([1e-2]), "trials": 10, "progress": False}
    pd.testing.assert_frame_equal(
        fp.explore(net, data, **search, client=dask).rates, fp.explore(net, data, **search).rates
    )
    budget = {"memory": 5 * 216, "ber": 1e-2, "trials": 3, "options": [fp.Affine(4), fp.Affine(5)]}
    pd.testing.assert_frame_equal(
        fp.explore_mixed(net, data, **budget, client=dask).table, fp.explore_mixed(net, data, **budget).table
    )


def test_protect_keeps_the_journals_of_all_forms_here(dask, tmp_path):
    net, data = Net(), samples()
    with torch.no_grad():
        data = [(x, net(x).argmax(dim=1)) for x, _ in data]
    asked = {"ber": 1e-2, "trials": 3, "front": 20, "rivals": {"8 bits": fp.Affine(8)}, "progress": False}
    here = fp.protect(net, data, **asked, journal=tmp_path / "here")
    there = fp.protect(net, data, **asked, journal=tmp_path / "there", client=dask)
    pd.testing.assert_frame_equal(there.evidence.drop(columns="time"), here.evidence.drop(columns="time"))
    pd.testing.assert_frame_equal(there.front, here.front)
    names = [sorted(path.name for path in (tmp_path / folder).glob("*.jsonl")) for folder in ("here", "there")]
    assert names[0] == names[1]
    before = {path: path.read_bytes() for path in (tmp_path / "there").glob("*.jsonl")}
    fp.protect(net, data, **asked, journal=tmp_path / "there", client=dask)  # resumed: no trial runs again
    for path, written in before.items():
        assert path.read_bytes().startswith(written)
        added = path.read_bytes()[len(written) :].splitlines()
        assert all(line.startswith(b'{"resumed":true') for line in added)


def test_packed_and_hardened_models_arrive_whole(pool):
    net, data = Net(), samples()
    safe = fp.harden(net, data, fp.Ranger())
    packed = fp.pack_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), fp.Affine(4))
    for model in (safe, packed):
        asked = SETUP | {"trials": 6}
        pd.testing.assert_frame_equal(
            rows(fp.assess(model, data, **asked, client=pool)), rows(fp.assess(model, data, **asked))
        )


def test_a_process_pool(tmp_path):
    with ProcessPoolExecutor(2) as executor:
        found = fp.assess(Net(), samples(), **SETUP, client=executor)
    pd.testing.assert_frame_equal(rows(found), rows(fp.assess(Net(), samples(), **SETUP)), check_exact=True)


def test_metrics_and_outputs_written_in_place(dask):
    asked = SETUP | {
        "output": lambda raw: raw[:, [2, 1, 0]],
        "metrics": {"mine": lambda out, targets: float(out.abs().max())},
    }
    found = fp.assess(Net(), samples(), **asked, client=dask)
    pd.testing.assert_frame_equal(rows(found), rows(fp.assess(Net(), samples(), **asked)), check_exact=True)


def test_the_page_about_clusters(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    program = text.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "laptop.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "laptop.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(fp.Assessment.load(tmp_path / "run.jsonl").records) == 200


class Counting:
    """An executor that counts what it is given."""

    def __init__(self, workers):
        self.inner = ThreadPoolExecutor(workers)
        self._max_workers = workers
        self.sizes, self.open, self.most, self.chunks = [], 0, 0, []

    def submit(self, function, token, needed, asked, sent, chunk):
        self.sizes.append(0 if sent is None else len(sent))
        self.chunks.append(pickle.loads(chunk))
        self.open += 1
        self.most = max(self.most, self.open)
        future = self.inner.submit(function, token, needed, asked, sent, chunk)
        future.add_done_callback(self.ended)
        return future

    def ended(self, _):
        self.open -= 1


def test_the_model_goes_once_jobs_in_chunks_and_two_ahead(monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK", 0.05)
    executor = Counting(1)
    fp.assess(Net(), samples(), **SETUP | {"trials": 300}, client=executor)
    assert sum(size > 0 for size in executor.sizes) <= 2  # two were under way before the first said that it lacks it
    assert executor.most <= cluster.AHEAD
    sizes = [len(chunk) for chunk in executor.chunks]
    assert sizes[0] == 1
    assert max(sizes) > 5


class Losing:
    """An executor that keeps the last record of some answers, or gives its first answer again and again."""

    def __init__(self, kind):
        self.inner, self.kind, self.first, self.count = ThreadPoolExecutor(1), kind, None, 0

    def submit(self, function, *arguments):
        def changed():
            found = function(*arguments)
            answer = pickle.loads(found)
            if answer.kind != "done":
                return found
            self.count += 1
            self.first = self.first or found
            if self.kind == "again":
                return self.first
            if self.count == 3:
                del answer.records[-1]
            return pickle.dumps(answer)

        return self.inner.submit(changed)


@pytest.mark.parametrize("kind", ["less", "again"])
def test_answers_that_are_short_or_of_other_jobs_are_refused(tmp_path, kind):
    with pytest.raises(InfrastructureError, match=r"was given \d+ jobs, from point 0, trial \d+ on, and answers"):
        fp.assess(Net(), samples(), **SETUP, client=Losing(kind), journal=tmp_path / "journal.jsonl")
    found = fp.assess(Net(), samples(), **SETUP, journal=tmp_path / "journal.jsonl")
    pd.testing.assert_frame_equal(rows(found), rows(fp.assess(Net(), samples(), **SETUP)), check_exact=True)


class Dim(nn.Module):
    """Two features that no weight reads: a fault there makes denormal numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(6, 8, bias=False)
        with torch.no_grad():
            self.a.weight[:2] = 0

    def forward(self, x):
        return (self.a(x * 1e-20) * 1e20)[:, :3]


def test_modes_of_the_driver_are_those_of_workers():
    """In threads of their own, which begin with others."""
    asked = SETUP | {"faults": fp.RandomBits(3), "trials": 60}
    with ThreadPoolExecutor(1) as client:
        client.submit(int).result()  # the thread is there before the mode is set
        assert torch.set_flush_denormal(True)
        try:
            there, here = (rows(fp.assess(Dim(), samples(), **asked, client=c)) for c in (client, None))
        finally:
            torch.set_flush_denormal(False)
        assert not client.submit(cluster.Modes.here).result().flush
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert not here.equals(rows(fp.assess(Dim(), samples(), **asked)))


def test_what_the_user_has_pickled_by_value_stays_so(pool):
    cloudpickle = pytest.importorskip("cloudpickle")
    me = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(me)
    try:
        fp.assess(Net(), samples(), **SETUP | {"trials": 2}, client=pool)
        assert me.__name__ in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(me)


class Beside(Net):
    """NumPy over a parameter's memory."""

    def __init__(self):
        super().__init__()
        self.array = self.b.bias.detach().numpy()

    def forward(self, x):
        return super().forward(x) + torch.from_numpy(self.array)


def test_an_array_over_a_parameters_memory_is_refused(pool):
    with pytest.raises(ConfigError, match=r"a NumPy array of shape \(3,\) lies in the memory of 'bias'"):
        fp.assess(Beside(), samples(), **SETUP, client=pool)


def test_recurrent_layers_that_are_parametrised(pool):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x.reshape(len(x), 2, 3))[0][:, -1])

    weighted = Tagger()
    nn.utils.parametrizations.weight_norm(weighted.lstm, "weight_hh_l0")
    for model in (fp.pack_(Tagger(), fp.Affine(6)), weighted):
        asked = SETUP | {"trials": 6}
        there = rows(fp.assess(model, samples(), **asked, client=pool))
        pd.testing.assert_frame_equal(there, rows(fp.assess(model, samples(), **asked)), check_exact=True)


# what goes wrong in a job


def test_errors_come_from_where_they_were_raised(pool):
    def broken(outputs, targets):
        if elsewhere():
            raise ZeroDivisionError("in a metric")
        return 0.0

    with pytest.raises(ZeroDivisionError, match="in a metric") as raised:
        fp.assess(Net(), samples(), **SETUP, metrics={"mine": broken}, client=pool)
    assert "on worker" in raised.value.__notes__[0]
    assert "in broken" in raised.value.__notes__[0]


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_exception_that_cannot_be_sent_keeps_its_words(pool):
    def broken(outputs, targets):
        if elsewhere():
            raise Unsendable("this", "that")
        return 0.0

    with pytest.raises(RuntimeError, match="Unsendable: this and that"):
        fp.assess(Net(), samples(), **SETUP, metrics={"mine": broken}, client=pool)


class Hungry(Net):
    """Memory runs out in the next calls elsewhere, while any are left."""

    def forward(self, x):
        if elsewhere() and torch.hungry and torch.hungry.pop():
            raise MemoryError("none left")
        return super().forward(x)


def test_memory_that_runs_out_is_tried_elsewhere(pool, monkeypatch):
    monkeypatch.setattr(torch, "hungry", [], raising=False)  # this file goes along by value, with its globals
    asked = SETUP | {"trials": 6, "audit": 0}
    expected = rows(fp.assess(Hungry(), samples(), **asked))
    arriving = [False] * (len(samples()) + 2)  # the check of the golden run, and what traces the model
    torch.hungry[:] = [True] * 4 + arriving  # a worker's own three tries, and one of the next
    found = fp.assess(Hungry(), samples(), **asked, cache_bytes=0, client=pool)
    assert not torch.hungry
    pd.testing.assert_frame_equal(rows(found), expected, check_exact=True)
    torch.hungry[:] = [True] * 100 + arriving
    with pytest.raises(InfrastructureError, match=r"lost 3 times .*none left"):
        fp.assess(Hungry(), samples(), **asked, cache_bytes=0, client=pool)


# what is refused


class Elsewhere(Net):
    """Another processor: sums differ in the last bit."""

    def forward(self, x):
        out = super().forward(x)
        return torch.nextafter(out, out + 1) if elsewhere() else out


def test_a_processor_that_answers_otherwise_is_refused(pool, tmp_path):
    with pytest.raises(ConfigError, match=r"process \d+ answers otherwise than the driver.*for 49 of 49 samples"):
        fp.assess(Elsewhere(), samples(), **SETUP, client=pool)
    for verb in (fp.analyze, fp.estimate_factors):
        with pytest.raises(ConfigError, match="answers otherwise"):
            verb(Elsewhere(), samples(), client=pool)


@pytest.mark.parametrize("name", ["torch", "flipproof", "numpy", "python"])
def test_other_software_is_refused_by_name(pool, monkeypatch, name):
    real = cluster.software

    def there():
        return real() | {name: "9.9"} if elsewhere() else real()

    monkeypatch.setattr(cluster, "software", there)
    with pytest.raises(ConfigError, match=rf"the worker .*process \d+ has {name} 9.9, not "):
        fp.assess(Net(), samples(), **SETUP, client=pool)


def test_misuse(pool, tmp_path):
    with pytest.raises(ConfigError, match=r"client= takes a distributed.Client or an executor.*got 'tcp://x:8786'"):
        fp.assess(Net(), samples(), **SETUP, client="tcp://x:8786")
    with pytest.raises(ConfigError, match=r"workers=2 .*client= .*one of the two"):
        fp.assess(Net(), samples(), **SETUP, client=pool, workers=2)
    net = Net()
    net.lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"cannot be sent: TypeError.*lock"):
        fp.assess(net, samples(), **SETUP, client=pool)
    gone = ThreadPoolExecutor(1)
    gone.shutdown()
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(InfrastructureError, match=r"can do no more.*shutdown"):
        fp.assess(Net(), samples(), **SETUP, client=gone, journal=journal)
    assert len(fp.assess(Net(), samples(), **SETUP, client=pool, journal=journal).records) == 80


def test_the_command_line(tmp_path, dask, monkeypatch):
    (tmp_path / "ours.py").write_text(PROGRAM)
    done = subprocess.run(
        [*(sys.executable, "-m", "flipproof", "assess", "ours.py:Net", "--data", "ours.py:samples"),
         *("--faults", "RandomBits(2)", "--trials", "6", "--cluster", dask.scheduler.address)],
        cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f'cluster = "{dask.scheduler.address}"' in next(tmp_path.rglob("campaign.toml")).read_text()
    wrong = subprocess.run(
        [*(sys.executable, "-m", "flipproof", "assess", "ours.py:Net", "--data", "ours.py:samples"),
         *("--faults", "RandomBits(2)", "--cluster", str(tmp_path / "none.json"))],
        cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "there is no Dask scheduler at" in " ".join(wrong.stderr.split()), wrong.stderr


# scheduler, workers and driver as programs of their own


PROGRAM = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
import flipproof as fp

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + float(os.environ.get("PROCESSOR", 0))

def samples():
    torch.manual_seed(2)
    return [(torch.randn(40, 6), torch.arange(40) % 3)]

class Trouble:
    '''Accuracy; once for each file in a folder, what the file is called happens to the process.'''

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, outputs, targets):
        if os.environ.get("WORKER"):
            time.sleep(0.02)
            for file in Path(self.folder).glob("*"):
                kind = file.name.split(".")[0]
                try:
                    file.unlink()
                except FileNotFoundError:  # another worker took it
                    continue
                if kind == "kill":
                    os.kill(os.getpid(), 9)
                if kind == "stop":
                    os.kill(os.getpid(), 19)
                if kind == "hang":
                    time.sleep(1000)
        return float((outputs.argmax(dim=1) == targets).double().mean())

def campaign(client, journal, folder, trials):
    return fp.assess(Net(), samples(), faults=fp.BitErrorRate([1e-3, 1e-2]), trials=trials, seed=3, client=client,
                     journal=journal, metrics={"mine": Trouble(folder)}, progress=False)

if __name__ == "__main__":
    from distributed import Client
    with Client(sys.argv[1], set_as_default=False) as client:
        client.wait_for_workers(int(os.environ.get("WORKERS", 1)))
        campaign(client, sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""


def environment(**more):
    paths = [str(SOURCE), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"} | more
    )


class Programs:
    """A scheduler and workers, each a program."""

    def __init__(self, folder):
        self.folder, self.running, self.port = folder, [], free_port()
        (folder / "trouble").mkdir()
        (folder / "ours.py").write_text(PROGRAM)
        self.scheduler = self.start_scheduler()

    @property
    def address(self):
        return f"tcp://127.0.0.1:{self.port}"

    def start(self, *command, within=(), **more):
        with open(self.folder / f"log{len(self.running)}.txt", "w") as file:
            program = subprocess.Popen(
                [*within, sys.executable, "-m", *command],
                cwd=self.folder,
                env=environment(**more),
                stdout=file,
                stderr=file,
            )
        self.running.append(program)
        return program

    def start_scheduler(self):
        command = ("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        return self.start(*command, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="20s")

    def start_worker(self, address=None, **more):
        command = (
            "distributed.cli.dask_worker",
            address or self.address,
            "--nthreads",
            "1",
            "--no-dashboard",
            "--no-nanny",
        )
        return self.start(*command, "--local-directory", str(self.folder), WORKER="1", **more)

    def trouble(self, kind):
        (self.folder / "trouble" / kind).touch()

    def stop(self):
        for program in self.running:
            if program.poll() is None:
                program.send_signal(signal.SIGCONT)
                program.kill()
        for program in self.running:
            program.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def programs(tmp_path):
    found = Programs(tmp_path)
    yield found
    found.stop()


@contextmanager
def connected(programs, workers):
    client = distributed.Client(programs.address, set_as_default=False)
    try:
        client.wait_for_workers(workers, timeout=60)
        yield client
    finally:
        client.close()


@pytest.fixture
def ours(programs, monkeypatch):
    monkeypatch.syspath_prepend(programs.folder)
    sys.modules.pop("ours", None)
    import ours

    yield ours
    sys.modules.pop("ours", None)


def expected_of(ours, programs, trials):
    return rows(ours.campaign(None, None, str(programs.folder / "trouble"), trials))


def test_a_worker_that_is_killed_and_one_that_comes_later(programs, ours, tmp_path):
    programs.start_worker()
    programs.start_worker()
    with connected(programs, 2) as client, after(tmp_path / "journal.jsonl", programs.start_worker):
        programs.trouble("kill")
        found = ours.campaign(client, tmp_path / "journal.jsonl", str(tmp_path / "trouble"), 60)
    assert sum(program.poll() == -9 for program in programs.running) == 1
    expected = expected_of(ours, programs, 60)
    pd.testing.assert_frame_equal(rows(found), expected, check_exact=True)
    pd.testing.assert_frame_equal(rows(fp.Assessment.load(tmp_path / "journal.jsonl")), expected, check_exact=True)


@LONG
def test_the_only_worker_that_has_the_model_is_killed(programs, ours, tmp_path):
    programs.start_worker()
    journal = tmp_path / "journal.jsonl"

    def kill():
        programs.trouble("kill")
        programs.start_worker()

    with connected(programs, 1) as client, after(journal, kill), warnings_of():
        found = ours.campaign(client, journal, str(tmp_path / "trouble"), 150)
    assert programs.running[1].poll() == -9
    pd.testing.assert_frame_equal(rows(found), expected_of(ours, programs, 150), check_exact=True)


@LONG
@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_worker_that_hangs(programs, ours, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cluster, "STALLED", 1.0)
    monkeypatch.setattr(cluster, "SLOWER", 0.1)
    monkeypatch.setattr(cluster, "CHUNK", 0.2)
    programs.start_worker()
    programs.start_worker()
    journal = tmp_path / "journal.jsonl"
    with connected(programs, 2) as client, after(journal, lambda: programs.trouble(kind)), warnings_of() as said:
        found = ours.campaign(client, journal, str(tmp_path / "trouble"), 150)
    assert not list((tmp_path / "trouble").iterdir())
    if kind == "hang":
        assert any("the first answer counts" in text for text in said)
    pd.testing.assert_frame_equal(rows(found), expected_of(ours, programs, 150), check_exact=True)


@contextmanager
def after(journal, action):
    """Something happens once the journal holds a few records."""

    def wait():
        while len(journal.read_bytes().splitlines() if journal.exists() else []) < 3:
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


@contextmanager
def warnings_of():
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FlipproofWarning)
        yield found
        found += [str(one.message) for one in caught]


@LONG
def test_a_scheduler_that_is_restarted(programs, ours, tmp_path):
    programs.start_worker()
    journal = tmp_path / "journal.jsonl"

    def restart():
        programs.scheduler.kill()
        programs.scheduler.wait()
        time.sleep(1)
        programs.scheduler = programs.start_scheduler()
        programs.start_worker()

    with connected(programs, 1) as client, after(journal, restart), warnings_of():
        found = ours.campaign(client, journal, str(tmp_path / "trouble"), 150)
    pd.testing.assert_frame_equal(rows(found), expected_of(ours, programs, 150), check_exact=True)


@LONG
def test_a_scheduler_that_does_not_come_back(programs, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RETURNS", 2.0)
    programs.start_worker()
    journal = tmp_path / "journal.jsonl"
    with (
        connected(programs, 1) as client,
        after(journal, programs.scheduler.kill),
        warnings_of(),
        pytest.raises(InfrastructureError, match=r"did not come back. Finished jobs are kept"),
    ):
        ours.campaign(client, journal, str(tmp_path / "trouble"), 150)
    kept = rows(fp.Assessment.load(journal))
    assert 0 < len(kept) < 300
    found = ours.campaign(None, journal, str(tmp_path / "trouble"), 150)
    pd.testing.assert_frame_equal(rows(found), expected_of(ours, programs, 150), check_exact=True)


def test_a_driver_that_is_killed_and_run_again(programs, ours, tmp_path):
    programs.start_worker()
    programs.start_worker()
    journal = tmp_path / "journal.jsonl"
    command = ("ours", programs.address, str(journal), str(tmp_path / "trouble"), "100")
    driver = programs.start(*command)
    while len(journal.read_bytes().splitlines() if journal.exists() else []) < 3:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert len(rows(fp.Assessment.load(journal))) < 200
    again = programs.start(*command)
    assert again.wait(timeout=120) == 0
    pd.testing.assert_frame_equal(rows(fp.Assessment.load(journal)), expected_of(ours, programs, 100), check_exact=True)


class Network:
    """A hub and hosts around it, each a network namespace of its own."""

    def __init__(self, hosts):
        self.names = [f"flipproof{os.getpid()}{name}" for name in ("hub", *hosts)]
        self.hub, self.hosts = self.names[0], dict(zip(hosts, self.names[1:], strict=True))
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("netns", "exec", self.hub, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for i, name in enumerate(self.names[1:]):
            ip("link", "add", f"fp{i}a", "netns", self.hub, "type", "veth", "peer", "name", f"fp{i}b", "netns", name)
            for where, device, address in ((self.hub, f"fp{i}a", f"10.77.{i}.1"), (name, f"fp{i}b", f"10.77.{i}.2")):
                ip("-n", where, "address", "add", f"{address}/24", "dev", device)
                ip("-n", where, "link", "set", device, "up")
            ip("-n", name, "route", "add", "default", "via", f"10.77.{i}.1")

    def cut(self, i):
        ip("-n", self.hub, "link", "set", f"fp{i}a", "down")

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*command):
    subprocess.run(["ip", *command], check=True, capture_output=True)


@LONG
def test_a_worker_whose_network_is_cut(programs, ours, tmp_path):
    """Machines of their own, as far as the network goes: no packet comes back, and no connection is closed."""
    try:
        network = Network(["one", "two"])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be had here: {error}")
    journal = tmp_path / "journal.jsonl"
    try:
        hub = ("ip", "netns", "exec", network.hub)
        listening = ("--host", "0.0.0.0", "--port", "8786", "--no-dashboard")
        programs.start(
            "distributed.cli.dask_scheduler", *listening, within=hub, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="20s"
        )
        for i, name in enumerate(network.hosts.values()):
            programs.start_worker(within=("ip", "netns", "exec", name), address=f"tcp://10.77.{i}.1:8786")
        driver = programs.start(
            "ours", "tcp://10.77.0.1:8786", str(journal), str(tmp_path / "trouble"), "200", within=hub, WORKERS="2"
        )
        with after(journal, lambda: network.cut(1)):
            assert driver.wait(timeout=200) == 0
    finally:
        programs.stop()
        network.remove()
    expected = expected_of(ours, programs, 200)
    pd.testing.assert_frame_equal(rows(fp.Assessment.load(journal)), expected, check_exact=True)


def test_a_worker_with_another_flipproof_or_processor(programs, ours, tmp_path):
    shutil.copytree(SOURCE / "flipproof", tmp_path / "other" / "flipproof")
    file = tmp_path / "other" / "flipproof" / "__init__.py"
    text = file.read_text()
    file.write_text(text.replace('__version__ = "', '__version__ = "9'))
    asked = (tmp_path / "journal.jsonl", str(tmp_path / "trouble"), 10)
    old = programs.start_worker(PYTHONPATH=str(tmp_path / "other"))
    with connected(programs, 1) as client:
        (address,) = client.nthreads()
        with pytest.raises(ConfigError, match=rf"the worker {address} has flipproof 9.*, not {fp.__version__} \("):
            ours.campaign(client, *asked)
        old.kill()
        file.write_text(text + "# another line\n")
        programs.start_worker(PYTHONPATH=str(tmp_path / "other"))
        gone(client, address)
        (address,) = client.nthreads()
        with pytest.raises(ConfigError, match=rf"the worker {address} has flipproof {fp.__version__} \("):
            ours.campaign(client, *asked)
        programs.running[-1].kill()
        programs.start_worker(PROCESSOR="1")
        gone(client, address)
        (address,) = client.nthreads()
        with pytest.raises(ConfigError, match=rf"the worker {address} answers otherwise"):
            ours.campaign(client, *asked)


def gone(client, address):
    until = time.monotonic() + 60
    while time.monotonic() < until and (address in client.nthreads() or not client.nthreads()):
        time.sleep(0.1)


def test_several_threads_of_a_worker_do_not_share_a_model():
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=":0") as local,
        distributed.Client(local, set_as_default=False) as client,
        pytest.warns(FlipproofWarning, match="1 of the 3 threads of 1 workers are used"),
    ):
        found = fp.assess(Net(), samples(), **SETUP, client=client)
    pd.testing.assert_frame_equal(rows(found), rows(fp.assess(Net(), samples(), **SETUP)), check_exact=True)


class OnPaper(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.a(x) * (self.scale * 2)


class WithBuffers(torch.fx.Tracer):
    proxy_buffer_attributes = True


def traced_with_its_buffer():
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(WithBuffers().trace(OnPaper()), {}))
    return torch.fx.GraphModule(OnPaper(), graph)


def test_a_traced_model_that_would_arrive_as_another_is_refused(pool):
    """`torch.fx` traces anew what it unpickles: what is computed from a buffer would be a constant there."""
    asked = SETUP | {"faults": fp.RandomBits(1)}
    traced = torch.fx.symbolic_trace(Net().a)
    assert len(fp.assess(nn.Sequential(traced, nn.ReLU()), samples(), **asked, client=pool).records) == 40
    with pytest.raises(ConfigError, match="a buffer that it reads becomes a constant"):
        fp.assess(traced_with_its_buffer(), samples(), **asked, client=pool)


class Secret(Net):
    """Answers alike without faults, and otherwise with them."""

    def forward(self, x):
        out = super().forward(x)
        return out.flip(1) if elsewhere() and self.b.bias[0] != self.first_bias else out

    def __init__(self):
        super().__init__()
        self.first_bias = float(self.b.bias.detach()[0])


def test_a_worker_that_differs_under_faults_alone_is_refused(pool):
    with pytest.raises(ConfigError, match="leaves another record of point 0, trial 0 than this process: "):
        fp.assess(Secret(), samples(), **SETUP | {"faults": fp.BitPosition(20)}, client=pool)


def test_memory_that_is_shared_stays_shared():
    net = Net()
    sent = torch.load(io.BytesIO(cluster.packed(net)), weights_only=False)
    with torch.no_grad():
        sent.a.weight[0, 0] = 7.0
    assert sent.first[0, 0] == 7.0
    assert np.shares_memory(sent.first.numpy(), sent.a.weight.detach().numpy())
