"""Mixed widths: what each layer is stored in, chosen by what faults there cost, under one memory budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from flipproof._fields import Fields, wrong
from flipproof._interrupts import gives_back
from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import do_all
from flipproof.engine.journal import Journal, Key
from flipproof.errors import ConfigError, InfrastructureError
from flipproof.faults import BitErrorRate
from flipproof.formats import Affine, Format, TripleMSB
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.device import check_device
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.storage.explore import WEIGHTS, Question

OPTIONS: tuple[Format, ...] = (
    *(Affine(bits=bits) for bits in range(3, 9)),
    *(TripleMSB(Affine(bits=bits)) for bits in range(2, 7)),
    *(TripleMSB(Affine(bits=bits), protect=2) for bits in (3, 4)),
)
"""Plain widths, FORTUNE's protected ones, and two protected bits."""


def doubt(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 − the probability of the right class, averaged; NaN counts 1. In [0, 1] like accuracy, but without its steps.

    >>> float(doubt(torch.tensor([[0.0, 0.0], [float("nan"), 1.0]]), torch.tensor([0, 1])))
    0.75
    """
    right = torch.softmax(outputs.double(), dim=1).gather(1, targets.reshape(-1, 1).to(outputs.device))
    return (1 - torch.nan_to_num(right, 0.0)).mean()


class Choice(NamedTuple):
    """What `explore_mixed` chose.

    Attributes:
        formats: {qualified name: format}, for `pack_`, and for `assess`, which then hits what is not in it in its own
            type, or with ``where=fp.Parameters(kinds=("weight",))`` the weights alone.
        table: one row a weight and option: `layer`, `format`, `bits`, `cost`, `chosen`.
        bits: stored bits of all together.
    """

    formats: dict[str, Format]
    table: pd.DataFrame
    bits: int


@gives_back
def explore_mixed(
    model: nn.Module,
    data: Data,
    *,
    memory: int,
    ber: float = 1e-3,
    options: Sequence[Format] = OPTIONS,
    trials: int = 20,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Choice:
    """Spend a memory budget on the layers whose bits matter most, instead of the same width everywhere.

    Each weight tensor in turn is stored in each option and hit at `ber`, the others left whole. Its cost is the doubt
    (1 − probability of the right class) that quantisation and faults together add. The choice is the one of least total
    cost within the budget: exact for costs that add up, which they do as long as faults are few. For other tasks than
    classification the cost is what their main metric loses.

    Args:
        model: a classifier with logits (N, C), or what `task` says.
        data: calibration batches, not those that the result is judged on.
        memory: stored bits of all weights together; uniform FORTUNE of 3 bits takes 5 a weight.
        ber: the rate to prepare for.
        options: stored forms to choose from.
        trials: repetitions a tensor and option.
        seed: of all draws.
        journal: file with one line a tensor and option; run again after an interruption and it resumes. The budget is
            not part of it: another `memory` reads the same measurements.
        workers: processes; each measures one tensor in one option at a time.
        client: see `assess`.
        output: see `assess`.
        task: see `assess`.
        decision: see `assess`.
        device: see `assess`.
        progress: see `assess`.

    Raises:
        ConfigError: if even the narrowest options do not fit the budget.

    Example:
        >>> import flipproof as fp
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> x = torch.randn(100, 8)
        >>> chosen = fp.explore_mixed(net, [(x, net(x).argmax(dim=1))], memory=5 * 192, ber=1e-2, trials=4)
        >>> sorted(chosen.formats), chosen.bits <= 960
        (['0.weight', '2.weight'], True)
    """
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ConfigError(f"explore_mixed takes memory= a whole number of bits, got {memory!r}")
    if not options or not all(isinstance(option, Format) for option in options):
        raise ConfigError(f"explore_mixed takes options= formats such as fp.Affine(4), at least one, got {options!r}")
    sites = [site for site in FaultSpace(model, format=Affine(), where=WEIGHTS).sites if site.format == Affine()]
    if not sites:
        raise ConfigError(
            f"explore_mixed stores weights in other formats, and this {type(model).__name__} has none that can be: "
            f"they are quantised already. Pass the floating-point model"
        )
    campaign = partial(
        assess,
        model,
        data=list(data),
        seed=seed,
        output=output,
        task=task_of(task, decision),
        device=device,
        progress=False,
    )
    whole = campaign(faults=BitErrorRate(0.0), trials=1)
    metric = whole.metrics[0]
    if whole.header.decision is not None:
        campaign, metric = partial(campaign, metrics={"doubt": doubt}), "doubt"
        whole = campaign(faults=BitErrorRate(0.0), trials=1)
    measuring = _Measuring(
        campaign=partial(campaign, faults=BitErrorRate(ber, exact=False), trials=trials),
        metric=metric,
        names=[site.name for site in sites],
        options=options,
        device=check_device(model, device),
        golden=whole.header.fingerprint.golden_outputs,
    )
    question = Question(
        whole.header.fingerprint,
        {
            "tensors": [[site.name, list(site.shape)] for site in sites],
            "options": [repr(option) for option in options],
            "ber": ber,
            "trials": trials,
            "seed": seed,
        },
    )
    keys = [(i, k) for i in range(len(sites)) for k in range(len(options))]
    file = None if journal is None else Journal(journal, Question, _Measurement, kind="mixed-width exploration")
    found = do_all(measuring, keys, question, file, workers=workers, client=client, progress=progress)
    table = pd.DataFrame(
        [
            (
                site.name,
                repr(option),
                option.stored_bits(site.shape),
                found[i, k].doubt - measuring.doubt_of(whole.golden[metric]),
            )
            for i, site in enumerate(sites)
            for k, option in enumerate(options)
        ],
        columns=["layer", "format", "bits", "cost"],
    )
    table["chosen"] = least_cost(table, memory)
    by_name = {repr(option): option for option in options}
    taken = table[table["chosen"]]
    formats = {str(layer): by_name[str(format)] for layer, format in zip(taken["layer"], taken["format"], strict=True)}
    return Choice(formats, table, int(taken["bits"].sum()))


@dataclass(frozen=True)
class _Measurement:
    """The mean doubt with one tensor stored in one option and hit: one line of the journal."""

    tensor: int
    option: int
    doubt: float

    @property
    def key(self) -> tuple[int, int]:
        return self.tensor, self.option

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> _Measurement:
        about = Fields(record, "the record")
        found = cls(about.whole("tensor"), about.whole("option"), about.number("doubt"))
        about.end()
        if not 0 <= found.doubt <= 1:
            raise wrong(about.at("doubt"), "a number in [0, 1]", found.doubt)
        return found


@dataclass(frozen=True)
class _Measuring:
    """Measures one tensor in one option: a campaign in which nothing else is stored or hit."""

    campaign: Callable[..., Assessment]
    metric: str
    names: Sequence[str]
    options: Sequence[Format]
    device: torch.device
    golden: str

    def __call__(self, tensor: int, option: int) -> _Measurement:
        name = self.names[tensor]
        found = self.campaign(format={name: self.options[option]}, where=Parameters(include=name))
        return _Measurement(tensor, option, self.doubt_of(float(found.summary[self.metric].iloc[0])))

    def doubt_of(self, value: float) -> float:
        """What is lacking to a task's main metric at its best, 1; of a classification the doubt itself."""
        return value if self.metric == "doubt" else 1 - value

    @property
    def serial_only(self) -> str:
        return "" if self.device.type == "cpu" else f"one process already fills {self.device}"

    def describe(self, key: Key) -> str:
        tensor, option = map(int, key)
        return f"{self.names[tensor]} as {self.options[option]!r}"

    def wake(self) -> None:
        """Nothing to prepare in a worker: each campaign sets up what it needs."""

    def differs(self) -> str:
        """Whether the model answers otherwise here without faults."""
        here = self.campaign(faults=BitErrorRate(0.0), trials=1).header.fingerprint.golden_outputs
        return "" if here == self.golden else "its outputs have another digest"

    def recover(self) -> None:
        """Nothing to give back: each campaign recovers by itself."""


@contextmanager
def _stdout_closed() -> Iterator[None]:
    """HiGHS writes a line of its own debugging to the process's output now and then, in the middle of tables."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def least_cost(table: pd.DataFrame, memory: int) -> NDArray[np.bool_]:
    """Which rows to take: one of each layer, together at most `memory` bits, of the least total cost.

    A multiple-choice knapsack: minimise Σ cost · x, where x is 0 or 1 for each row, Σ x = 1 in each layer and
    Σ bits · x ≤ memory.

    Args:
        table: columns `layer`, `bits` and `cost`, which may be negative.
        memory: the budget in bits.

    Raises:
        ConfigError: if the narrowest options do not fit.
    """
    least = int(table.groupby("layer")["bits"].min().sum())
    if least > memory:
        raise ConfigError(f"the narrowest options take {least:,} bits, the budget is {memory:,}")
    # an option that a smaller one of the same layer equals or beats is never taken, so that ties go to the smaller
    rows = table.sort_values(["bits", "cost"])
    before = rows.groupby("layer")["cost"].cummin().groupby(rows["layer"]).shift()
    rows = rows[~(rows["cost"] >= before)]
    # the solver's tolerances are absolute, about 1e-6: costs are brought to a scale where that is nothing
    costs = (rows["cost"] - rows.groupby("layer")["cost"].transform("min")).to_numpy()
    scale = 1e6 / (costs.max() or 1.0)
    bits = rows["bits"].to_numpy()
    unit = np.gcd.reduce(bits)
    layers = pd.factorize(rows["layer"])[0]
    of_layer = np.eye(layers.max() + 1)[:, layers]
    with _stdout_closed():
        solved = milp(
            scale * costs,
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(of_layer, 1, 1), LinearConstraint(bits / unit, ub=memory // unit)],
            options={"mip_rel_gap": 0.0},
        )
    taken = rows.index[solved.x > 0.5] if solved.success else rows.index[:0]
    if len(taken) != len(of_layer) or int(table.loc[taken, "bits"].sum()) > memory:
        raise InfrastructureError(f"scipy.optimize.milp found no selection within {memory:,} bits: {solved.message}")
    return np.asarray(table.index.isin(taken))
