"""Mixed widths: what each layer is stored in, chosen by what faults there cost, under one memory budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.campaigns.assess import assess
from flipproof.errors import ConfigError
from flipproof.faults import BitErrorRate
from flipproof.formats import Affine, Format, TripleMSB
from flipproof.running.data import Data, Output
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.storage.study import WEIGHTS, slug

OPTIONS: tuple[Format, ...] = (
    *(Affine(bits=bits) for bits in range(3, 9)),
    *(TripleMSB(Affine(bits=bits)) for bits in range(2, 7)),
    *(TripleMSB(Affine(bits=bits), protect=2) for bits in (3, 4)),
)
"""Plain widths, FORTUNE's protected ones, and two protected bits."""


def doubt(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 − the probability of the right class, averaged; NaN counts 1. Smoother than accuracy, and as bounded.

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
    output: Output = None,
    progress: bool | None = None,
) -> Choice:
    """Spend a memory budget on the layers whose bits matter most, instead of the same width everywhere.

    Each weight tensor in turn is stored in each option and hit at `ber`, the others left whole. Its cost is the doubt
    (1 − probability of the right class) that quantisation and faults together add. The choice is the one of least total
    cost within the budget: exact for costs that add up, which they do as long as faults are few.

    Args:
        model: a classifier with logits (N, C).
        data: calibration batches, not those that the result is judged on.
        memory: stored bits of all weights together; uniform FORTUNE of 3 bits takes 5 a weight.
        ber: the rate to prepare for.
        options: stored forms to choose from.
        trials: repetitions a tensor and option.
        seed: of all draws.
        journal: folder of the journals; run again after an interruption and it resumes.
        workers: see `assess`.
        output: see `assess`.
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
    batches = list(data)
    sites = [site for site in FaultSpace(model, format=Affine(), where=WEIGHTS).sites if site.format == Affine()]
    base = assess(
        model, data=batches, faults=BitErrorRate(0.0), metrics={"doubt": doubt}, trials=1, output=output, progress=False
    ).golden["doubt"]
    rows = []
    for site in sites:
        for format in options:
            found = assess(
                model,
                data=batches,
                faults=BitErrorRate(ber, exact=False),
                format={site.name: format},
                where=Parameters(include=site.name),
                metrics={"doubt": doubt},
                trials=trials,
                seed=seed,
                journal=None if journal is None else Path(journal) / f"{slug(site.name)}-{slug(repr(format))}.jsonl",
                workers=workers,
                output=output,
                progress=progress,
            )
            cost = float(found.summary["doubt"].iloc[0]) - base
            rows.append((site.name, format, format.layout(site.values).bits, cost))
    picked = _cheapest([site.name for site in sites], rows, memory)
    table = pd.DataFrame(
        [(name, repr(format), bits, cost, picked[name] == format) for name, format, bits, cost in rows],
        columns=["layer", "format", "bits", "cost", "chosen"],
    )
    return Choice(picked, table, int(table.loc[table["chosen"], "bits"].sum()))


def _cheapest(names: list[str], rows: list[tuple[str, Format, int, float]], memory: int) -> dict[str, Format]:
    """The selection of one option a name with the least total cost in `memory` bits.

    Layer by layer, of all partial selections only those stay that no other one beats in bits and cost at once.
    """
    partial: list[tuple[int, float, tuple[Format, ...]]] = [(0, 0.0, ())]
    for name in names:
        longer = [
            (bits + more, cost + extra, (*chosen, format))
            for bits, cost, chosen in partial
            for other, format, more, extra in rows
            if other == name and bits + more <= memory
        ]
        if not longer:
            least = sum(min(bits for other, _, bits, _ in rows if other == each) for each in names)
            raise ConfigError(f"explore_mixed: the narrowest options take {least:,} bits, the budget is {memory:,}")
        partial, best = [], float("inf")
        for selection in sorted(longer, key=lambda s: (s[0], s[1])):
            if selection[1] < best:
                partial.append(selection)
                best = selection[1]
    return dict(zip(names, min(partial, key=lambda s: s[1])[2], strict=True))
