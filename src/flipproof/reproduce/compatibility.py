"""Which verbs work on which networks: every cell of models × verbs is tried, and held against something independent.

    python -m flipproof.reproduce.compatibility --out docs/compatibility.md

A cell works if the verb gives what it promises and a check of its own finds that it did something; it is refused if a
`FlipproofError` says why. Whatever else happens is a fault of flipproof's. Each network runs in a process of its own.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipproof.analysis.deepvigor import DeepVigor, analyze
from flipproof.campaigns.assess import assess
from flipproof.errors import FlipproofError
from flipproof.faults import BitErrorRate, RandomBits
from flipproof.formats import Affine, Float16, Rounded
from flipproof.hardening.bounds import Bounded, ClampInput, ZeroAbove
from flipproof.hardening.files import load_hardened, save_hardened
from flipproof.hardening.harden import harden
from flipproof.hardening.report import hardening_report
from flipproof.reproduce.compatibility_networks import BATCH, NETWORKS, Network, Subject, numbers
from flipproof.running.data import call
from flipproof.running.tasks import Detection
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Neurons
from flipproof.spaces.tensors import inventory
from flipproof.storage.coded import load_coded
from flipproof.storage.files import load_packed, save_packed
from flipproof.storage.pack import pack_, packed_bytes
from flipproof.storage.protect import protect

SECONDS = 30.0
"""A cell may take on one core."""

_KILLED = 4 * SECONDS
"""Of one core, after which a cell's process is ended."""
_WAITED = 20
"""So many times as long it may wait for its core."""

WORKS, REFUSED, OUTSIDE, SILENT, CRASHED, SLOW = "works", "refused", "outside", "silent", "crashed", "slow"
GOOD = (WORKS, REFUSED, OUTSIDE)
"""How a cell may end. Outside: PyTorch's exporter refuses the network as it came, hardened or not."""

_FORMAT = Affine(bits=8)
_FLIPS = 64
"""Expected in a trial."""


class SilentError(Exception):
    """A verb came back without an error and without having done what it says."""


class OutsideError(Exception):
    """Another package refuses the network as it came."""


@dataclass(frozen=True)
class Cell:
    """One network and one verb.

    Attributes:
        network: its name.
        verb: what was tried.
        state: see `GOOD`; "silent" for a check that failed, "crashed" for any other error, "slow" beyond `SECONDS`.
        said: what was seen, or the error.
        seconds: of one core that it took.
    """

    network: str
    verb: str
    state: str
    said: str
    seconds: float


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two answers are bit-identical; NaN is like NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_close(found: Tensor, expected: Tensor, what: str, *, room: float = 1e-3) -> None:
    half = expected.dtype in (torch.float16, torch.bfloat16)
    room = max(room, 5e-2 if half else 0.0) * float(expected.abs().max())
    if found.shape != expected.shape:
        raise SilentError(f"{what}: {tuple(found.shape)} instead of {tuple(expected.shape)}")
    apart = float((found.double() - expected.double()).abs().max())
    if not apart <= room:
        raise SilentError(f"{what}: answers are {apart:.3g} apart, rounding makes {room:.3g} at most")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise SilentError(what)


@dataclass
class Bench:
    """A network under test, and what verbs that build on each other share."""

    subject: Subject
    golden: Tensor = field(init=False)
    modes: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.golden, self.modes = self.subject.answers(), self._modes()

    def _modes(self) -> list[bool]:
        return [module.training for module in self.subject.model.modules()]

    @cached_property
    def hardened(self) -> nn.Module:
        """The copy that `harden` makes."""
        return harden(self.subject.model, self.subject.calibration, self.subject.method, **self.subject.reading)

    @cached_property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The first batch as arguments, by position and by name."""
        inputs, _ = self.subject.data[0]
        return _arguments(inputs)

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The hardened copy, exported by PyTorch for any number of samples."""
        try:
            return _exported(self.hardened, *self.example)
        except FlipproofError:
            raise
        except Exception as error:  # whatever the exporter raises
            try:
                _exported(self.subject.model, *self.example)
            except Exception as same:
                raise OutsideError(f"torch.export refuses the network as it came: {_first_line(same)}") from error
            raise

    def is_as_it_came(self) -> None:
        """Make sure that a verb gave the network back."""
        _check(self._modes() == self.modes, "training flags are not given back")
        _check(_same_bits(self.subject.answers(), self.golden), "the network is not given back: it answers otherwise")


# --- the verbs -----------------------------------------------------------------------------------------------------


def weights(bench: Bench) -> str:
    """`assess` over stored bits; single faults are also made by hand, in a copy."""
    subject = bench.subject
    space = FaultSpace(subject.model)
    faults = BitErrorRate(min(0.5, _FLIPS / space.bits))
    found = assess(subject.model, subject.data, faults=faults, trials=3, seed=1, audit=1.0, **subject.reading)
    flips, samples = int(found.trials["flips"].sum()), int(found.trials["samples"].sum())
    changed = samples - int(found.trials["masked"].sum())
    _check(flips > 0, "no bit was flipped")
    _check(found.golden[found.metrics[0]] == 1.0, f"golden is {found.golden}, of a network that is always right")
    _check(changed > 0, f"{flips} flips changed no answer")
    return f"{flips} flips change {changed} of {samples} answers; {_by_hand(bench, space)} single flips as by hand"


def _by_hand(bench: Bench, space: FaultSpace, count: int = 6) -> int:
    """Flip the most significant exponent bit of some values, once by the space and once in a copy's memory."""
    model, subject = bench.subject.model, bench.subject
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # what is packed is no tensor
    wide = [s for s in space.sites if s.dtype in _EXPONENT and s.width == torch.finfo(s.dtype).bits]
    plain = [s for s in wide if s.name in named]
    chosen = [plain[i] for i in np.unique(np.linspace(0, len(plain) - 1, count).round().astype(int))] if plain else []
    changed = 0
    for site in chosen:
        words, bit = _EXPONENT[site.dtype]
        copy = deepcopy(model)
        tensor = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}[site.name].detach()
        flat = tensor.reshape(-1).clone()
        word = flat.numel() // 2
        flat.view(words)[word] ^= 1 << bit
        with torch.no_grad():
            tensor.copy_(flat.reshape(tensor.shape))
        expected = subject.answers(copy)
        with space.corrupted(space.faults([(site.name, word, bit)])):
            given = subject.answers()
        _check(_same_bits(given, expected), f"bit {bit} of value {word} of {site.name} is not the one flipped by hand")
        changed += not _same_bits(given, bench.golden)
    _check(changed > 0 or not chosen, f"exponent bits of {[site.name for site in chosen]} change no answer")
    return len(chosen)


_EXPONENT = {torch.float32: (torch.int32, 30), torch.float16: (torch.int16, 14), torch.bfloat16: (torch.int16, 14)}
"""Of each type, integers of the same size and the number of the most significant exponent bit."""


def neurons(bench: Bench) -> str:
    """`assess` over computed values."""
    subject = bench.subject
    found = assess(
        subject.model,
        subject.data,
        faults=RandomBits(1),
        where=Neurons(),
        trials=8,
        seed=1,
        audit=1.0,
        **subject.reading,
    )
    flips, samples = int(found.trials["flips"].sum()), int(found.trials["samples"].sum())
    changed = samples - int(found.trials["masked"].sum())
    _check(flips > 0, "no bit was flipped")
    _check(changed > 0, f"{flips} upsets changed no answer")
    return f"{flips} upsets change {changed} of {samples} answers; {100 * found.coverage:.3g} % covered"


def analysis(bench: Bench) -> str:
    """`analyze`, one neuron a layer."""
    method = DeepVigor(neurons=1, ranges=False, holes=8)
    found = analyze(bench.subject.model, bench.subject.data, method, **bench.subject.reading)
    rates = found.layers["lvf"]
    _check(len(rates) > 0 and found.coverage > 0, "the map speaks of nothing")
    _check(bool(rates.between(-1, 2).all()), f"factors are {rates.tolist()}")
    return f"{len(rates)} layers, {100 * found.coverage:.3g} % of the multiplications"


def hardening(bench: Bench) -> str:
    """`harden`; then all weights are made a thousand times too large, and no bounded value may be beyond its bound."""
    hardened = bench.hardened
    report = hardening_report(hardened)
    _check(len(report.sites) > 0, "nothing is bounded")
    warned = ""
    if report.judged is not None and report.judged.costs:  # which it says in a warning
        warned = f"; warns: {report.judged}"
    elif reached := _reached(bench, hardened):
        warned = f"; {reached} of them are reached without faults by samples that bounds were not made on"
    else:
        _check_close(bench.subject.answers(hardened), bench.golden, "hardened")
    copy = deepcopy(hardened)
    bounds = {id(p) for m in copy.modules() if isinstance(m, Bounded) for p in m.parameters(recurse=False)}
    weights = [p for p in copy.parameters() if id(p) not in bounds and p.is_floating_point()]
    with torch.no_grad():
        for parameter in weights:
            parameter.mul_(1e3)
    _check(_reached(bench, copy) > 0 or not weights, "no bound was reached by weights a thousand times too large")
    left = f", {len(report.unreachable)} not" if report.unreachable else ""
    return f"{len(report.sites)} activations bounded{left}{warned}"


def _reached(bench: Bench, model: nn.Module) -> int:
    """How many bounds are reached, after seeing that none lets a value beyond it pass."""
    bitten: set[int] = set()

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # an activation may work in place
        assert isinstance(module, Bounded)
        value = args[0] if isinstance(module, ClampInput) else module.activate(args[0].clone())
        if bool((value > module.threshold).any()):
            bitten.add(id(module))

    def after(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(module, Bounded)
        within = result <= module.threshold
        if isinstance(module, ClampInput):  # the bound is of its input
            within = result.isfinite()
        elif isinstance(module, ZeroAbove):  # which is what it gives instead, also where bounds are negative
            within |= result == 0
        _check(bool(within.all()), f"a value passes {module} beyond its bound")

    hooks = []
    for module in model.modules():
        if isinstance(module, Bounded):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        bench.subject.answers(model)
    finally:
        for hook in hooks:
            hook.remove()
    return len(bitten)


def saving(bench: Bench) -> str:
    """`save_hardened` and `load_hardened`, around a network of other weights."""
    hardened = bench.hardened
    with tempfile.TemporaryDirectory() as folder:
        again = load_hardened(_emptied(bench.subject.model), save_hardened(hardened, f"{folder}/hardened.safetensors"))
    _check(
        _same_bits(bench.subject.answers(again), bench.subject.answers(hardened)), "it answers otherwise once loaded"
    )
    return "the same bits"


def exporting(bench: Bench) -> str:
    """The hardened copy through `torch.export`, run on two batch sizes."""
    run = bench.program.module()
    for inputs in _two_sizes(bench.subject):
        arguments, named = _arguments(inputs)
        with torch.no_grad():
            _check_close(numbers(run(*arguments, **named)), numbers(call(bench.hardened, inputs)), "exported")
    return "equal at two batch sizes"


def to_onnx(bench: Bench) -> str:
    """The exported copy as ONNX, run by onnxruntime on two batch sizes."""
    program = bench.program
    try:
        session = _session(program)
    except Exception as error:  # whatever exporter and runtime raise
        try:
            _session(_exported(bench.subject.model, *bench.example))
        except Exception as same:
            raise OutsideError(f"the network as it came cannot be run as ONNX: {_first_line(same)}") from error
        raise
    for inputs in _two_sizes(bench.subject):
        with torch.no_grad():
            expected = call(bench.hardened, inputs)
        given = [leaf for leaf in pytree.tree_leaves(_arguments(inputs)) if isinstance(leaf, Tensor)]
        names = [one.name for one in session.get_inputs()]
        found = session.run(None, {name: leaf.numpy() for name, leaf in zip(names, given, strict=True)})
        _check_close(numbers([torch.from_numpy(one) for one in found]), numbers(expected), "ONNX")
    return "equal at two batch sizes"


def packing(bench: Bench) -> str:
    """`pack_`, held against the simulated form."""
    model = bench.subject.model
    packed = pack_(deepcopy(model), _FORMAT)
    before, after = packed_bytes(model), packed_bytes(packed)
    _check(after < before, f"{after} bytes packed, {before} before")
    with FaultSpace(model, format=_FORMAT).stored():
        expected = bench.subject.answers()
    _check(_same_bits(bench.subject.answers(packed), expected), "packed and simulated words are read differently")
    with tempfile.TemporaryDirectory() as folder:
        again = load_packed(_emptied(model), save_packed(packed, f"{folder}/words.safetensors"))
    _check(_same_bits(bench.subject.answers(again), expected), "it answers otherwise once loaded")
    return f"{100 * after / before:.0f} % of the memory, saved and loaded"


def protecting(bench: Bench) -> str:
    """`protect` at a rate of 1e-4, in the memory that the network has; a tenth more if a library has quantised it."""
    subject = bench.subject
    quantised = any(candidate.held for candidate in inventory(subject.model))
    safe = protect(
        subject.model,
        subject.data,
        ber=1e-4,
        memory=0.1 if quantised else 0.0,
        trials=3,
        front=0,
        rivals={"8 bits": _FORMAT},
        inners=(Rounded(Float16(), bits=11),),
        **subject.reading,
    )
    _check(len(safe.formats) > 0, "nothing is packed")
    if safe.at_load:
        with tempfile.TemporaryDirectory() as folder:
            other = deepcopy(subject.model)
            for candidate in inventory(other):
                candidate.tensor.data.zero_()
            again = load_coded(other, safe.save(folder) / "coded.safetensors")
        _check(_same_bits(subject.answers(again), bench.golden), "it answers otherwise once loaded")
        takes = 100 * min(safe.evidence.loc[safe.evidence["form"].str.startswith("protected"), "memory"])
        return f"{safe.verdict}, {len(safe.formats)} tensors coded where they are stored, {takes:+.0f} % of the memory"
    before, after = packed_bytes(subject.model), packed_bytes(safe.model)
    _check(after <= before, f"{after} bytes are more than the {before} of the network as it came")
    clean = min(safe.evidence.loc[safe.evidence["form"].str.startswith("protected"), "clean"])
    _check(clean >= 0.5, f"without faults the protected network keeps {100 * clean:.0f} %")
    if not isinstance(subject.reading["task"], Detection):  # which finds more or fewer boxes
        _check_close(subject.answers(safe.model), bench.golden, "protected", room=0.1)
    return f"{safe.verdict}, {len(safe.formats)} tensors packed, {100 * after / before:.0f} % of the memory"


VERBS: dict[str, Callable[[Bench], str]] = {
    "assess, weights": weights,
    "assess, neurons": neurons,
    "analyze": analysis,
    "harden": hardening,
    "save, load": saving,
    "torch.export": exporting,
    "ONNX": to_onnx,
    "pack_": packing,
    "protect": protecting,
}
"""The columns."""


def _session(program: torch.export.ExportedProgram) -> Any:
    """A program as ONNX, in onnxruntime."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        graph = torch.onnx.export(program, dynamo=True, verbose=False)
    assert graph is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        graph.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _emptied(model: nn.Module) -> nn.Module:
    """The same network without its weights."""
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    return copy


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _two_sizes(subject: Subject) -> Iterable[Any]:
    """Inputs of the first batch, and of the first and part of the second."""
    first, second = (inputs for inputs, _ in subject.data)
    yield first
    trees = [pytree.tree_flatten(inputs) for inputs in (first, second)]
    joined = [torch.cat([a, b])[: 2 * BATCH - 1] for a, b in zip(trees[0][0], trees[1][0], strict=True)]
    yield pytree.tree_unflatten(joined, trees[0][1])


def _exported(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> torch.export.ExportedProgram:
    def dynamic(leaf: Any) -> Any:
        return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) else None

    shapes: Any = pytree.tree_map(dynamic, named if named else args)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own
        return torch.export.export(model, args, named, dynamic_shapes=shapes)


# --- cells ---------------------------------------------------------------------------------------------------------


def tried(
    network: Network,
    verbs: Sequence[str] = tuple(VERBS),
    *,
    end_after: float | None = None,
    trace: IO[str] = sys.stderr,
) -> Iterable[Cell]:
    """Try verbs on one network, here.

    Args:
        network: which one.
        verbs: names in `VERBS`.
        end_after: seconds of a core after which this process is ended, for cells that never come back.
        trace: where it is written what such a cell was doing.

    Yields:
        A cell a verb.
    """
    bench = Bench(network.subject())
    for verb in verbs:
        if end_after is not None:
            faulthandler.dump_traceback_later(_WAITED * end_after, exit=True, file=trace)
            _end_after(end_after, trace)
        began = time.process_time()  # of this core, whatever else the machine does
        state, said = _state(VERBS[verb], bench)
        elapsed = time.process_time() - began
        faulthandler.cancel_dump_traceback_later()
        if end_after is not None:
            _end_after(0.0, trace)
        yield Cell(network.name, verb, SLOW if elapsed > SECONDS and state in GOOD else state, said, elapsed)


def _end_after(seconds: float, trace: IO[str]) -> None:
    """End this process after so much time of its core, where a system counts that; 0 for never."""
    if hasattr(signal, "setitimer"):
        faulthandler.register(signal.SIGPROF, trace, chain=True)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _state(verb: Callable[[Bench], str], bench: Bench) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = verb(bench)
            state = WORKS
    except FlipproofError as error:
        state, said = REFUSED, f"{type(error).__name__}: {error}"
    except OutsideError as error:
        state, said = OUTSIDE, str(error)
    except SilentError as error:
        state, said = SILENT, str(error)
    except Exception:
        state, said = CRASHED, traceback.format_exc()
    try:
        bench.is_as_it_came()
    except SilentError as error:
        return SILENT, str(error)
    return state, said


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def in_a_process(network: Network, folder: Path) -> list[Cell]:
    """All cells of one network, in processes of their own; one that dies is followed by one for the other verbs.

    Processes are forked where that can be done: everything is imported then.
    """
    cells: list[Cell] = []
    context: Any = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    while len(cells) < len(VERBS):
        verbs = list(VERBS)[len(cells) :]
        target, trace = folder / "cells.jsonl", folder / "trace.txt"
        target.write_text("", encoding="utf-8")
        process = context.Process(target=_try, args=(network.name, verbs, target, trace))
        process.start()
        process.join()
        lines = target.read_text(encoding="utf-8").splitlines()
        cells += [Cell(**json.loads(line)) for line in lines]
        if len(lines) < len(verbs):
            where = trace.read_text(encoding="utf-8")[:2000] if trace.exists() else ""
            said = f"its process ended with {process.exitcode}: {where}"
            cells.append(Cell(network.name, verbs[len(lines)], CRASHED, said, _KILLED))
    return cells


def _try(name: str, verbs: Sequence[str], target: Path, trace: Path) -> None:
    """In a process of its own: a line a cell."""
    torch.set_num_threads(1)
    (network,) = [each for each in NETWORKS if each.name == name]
    with target.open("w", encoding="utf-8") as lines, trace.open("w", encoding="utf-8") as traces:
        faulthandler.enable(traces)
        for cell in tried(network, verbs, end_after=_KILLED, trace=traces):
            print(json.dumps(asdict(cell)), file=lines, flush=True)


# --- the page ------------------------------------------------------------------------------------------------------

_MARKS = {WORKS: "✓", REFUSED: "refused", OUTSIDE: "–", SILENT: "**silent**", CRASHED: "**crash**", SLOW: "**slow**"}


def page(cells: Sequence[Cell], about: str) -> str:
    """The table with its footnotes, as Markdown.

    Args:
        cells: in the order of `NETWORKS` and `VERBS`.
        about: on what they were tried.
    """
    notes: dict[str, int] = {}
    rows = []
    for name, group in groupby(cells, key=lambda cell: cell.network):
        marks = []
        for cell in group:
            mark = _MARKS[cell.state]
            if cell.state != WORKS:
                mark += f" [{notes.setdefault(_sentence(cell), len(notes) + 1)}]"
            marks.append(mark)
        rows.append(f"| {name} | {_package_of(name)} | " + " | ".join(marks) + " |")
    counts = pd.Series([cell.state for cell in cells]).value_counts()
    lines = [
        "# What works on which network",
        "",
        f"{len(rows)} of {len(NETWORKS)} networks × {len(VERBS)} verbs: "
        + ", ".join(f"{count} {state}" for state, count in counts.items())
        + f". {about}",
        "",
        _HEAD,
        "| network | from | " + " | ".join(VERBS) + " |",
        "|---|---|" + "---|" * len(VERBS),
        *rows,
        "",
        "## Notes",
        "",
        *(f"{number}. {sentence}" for sentence, number in notes.items()),
    ]
    return "\n".join(lines) + "\n"


_HEAD = """Networks have small configurations and random weights, which prove that a verb can be used and not that its
numbers make sense ([trained networks](results/trained/README.md)). ✓: it works, and a check outside of the verb says
that it did something:

- **assess, weights**: flips change answers; single flips give the bits that the same flips by hand give, in a copy.
- **assess, neurons**: upsets change answers; every trial ran again whole on a fresh copy.
- **analyze**: one neuron a layer; the map covers something.
- **harden**: `Guard`, or `AVC` for recurrent networks; equal answers without faults; with all weights a thousand times
  too large, bounds are reached and no value is beyond one.
- **save, load**: the hardened copy from its file, around a network without weights, gives the same bits.
- **torch.export**, **ONNX**: the hardened copy, exported for any batch size and run (by onnxruntime) on two, gives
  equal answers up to rounding.
- **pack_**: 8 bits; less memory, and the same bits as the simulated form; from its file too.
- **protect**: at a bit error rate of 1e-4, in no more memory. What a library has quantised is coded in a tenth more,
  and answers the same from its file.

After each the network answers the same bits as before. "refused": a `FlipproofError` says why and what to do. "–":
PyTorch's exporter takes the network as it came no more than the hardened one.
"""


def _sentence(cell: Cell) -> str:
    """What a cell says in one line: of a crash, what was raised and not where."""
    said = (cell.said.strip().splitlines() or [""])[-1] if cell.state == CRASHED else cell.said
    return " ".join(said.split())[:700].replace("|", "\\|")


def _package_of(name: str) -> str:
    (found,) = [network.package for network in NETWORKS if network.name == name]
    return found


def _about() -> str:
    versions = []
    for package in ("torch", "torchvision", "timm", "transformers", "torchao", "onnxruntime"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return (
        f"Tried on {date.today().isoformat()} with {', '.join(versions)}, Python {platform.python_version()}, one core "
        f"of {platform.machine()}. Made by `make compatibility`."
    )


def main() -> None:
    """Try the cells and write the page."""
    parser = argparse.ArgumentParser(description="Which verbs work on which networks.")
    parser.add_argument("--out", type=Path, default=Path("docs/compatibility.md"))
    parser.add_argument("--cells", type=Path, default=Path("docs/results/compatibility/cells.csv"))
    parser.add_argument("--only", default="", help="networks whose name (family) this pattern finds; others are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for package in {network.package for network in NETWORKS if network.installed} | {"onnxscript", "onnxruntime"}:
        import_module(package)  # once for all processes
    known: dict[str, list[Cell]] = {}
    if given.only and given.cells.exists():
        for row in pd.read_csv(given.cells, keep_default_na=False).itertuples(index=False):
            known.setdefault(str(row.network), []).append(Cell(*row))
    with tempfile.TemporaryDirectory() as folder:
        for network in NETWORKS:
            if re.search(given.only, f"{network.name} ({network.family})") and network.installed:
                found = known[network.name] = in_a_process(network, Path(folder))
                states = "  ".join(f"{c.verb}: {c.state} {c.seconds:.1f} s" for c in found)
                print(f"{network.name}: {states}", flush=True)
                cells = [cell for each in NETWORKS for cell in known.get(each.name, ())]
                given.cells.parent.mkdir(parents=True, exist_ok=True)
                rows = [asdict(cell) | {"said": _sentence(cell)} for cell in cells]
                pd.DataFrame(rows).to_csv(given.cells, index=False, float_format="%.2f")
    given.out.write_text(page(cells, _about()), encoding="utf-8")
    if bad := [cell for cell in cells if cell.state not in GOOD]:
        sys.exit("\n".join(f"{cell.network}, {cell.verb}: {cell.state}: {cell.said}" for cell in bad))


if __name__ == "__main__":
    main()
