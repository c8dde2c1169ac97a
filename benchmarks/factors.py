"""Factors by audited search beside random injection: the same stopping rule, margin after margin, set-up included.

Both go through `estimate_factors`, `by="search"` and `by="injection"`: the same inputs drawn, the same golden run and
checks, only what lies behind a layer run, the same provable answers not asked, the same intervals (over the population
of inputs), and each stops when its interval is within the margin.
"""

from __future__ import annotations

import time
import warnings

import torch

import flipproof as fp
from benchmarks.measure import Row, Size, one_thread
from flipproof.datasets import digits
from flipproof.demo import trained_digits_cnn
from flipproof.models import digits_cnn


def run(size: Size) -> list[Row]:
    """Forwards and seconds of injection ÷ those of the search, by margin, over all layers and of the first."""
    if size is Size.SMOKE:
        net, data = digits_cnn().eval(), [(torch.rand(12, 1, 8, 8), torch.zeros(12))]
        margins = [0.2]
    else:
        net, data = trained_digits_cnn(), digits("train", batch_size=500)
        margins = [0.02, 0.01, 0.005, 0.002] if size is Size.FULL else [0.02, 0.01, 0.005]
    rows = []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FlipproofWarning)  # few inputs: the margin is then met for those given
        for of, where in (("neurons", fp.Neurons()), ("weights", fp.Parameters("*.weight"))):
            for margin in margins:
                rows += _compared(net, data, where, of, margin, size.choose(2, 1, 1))
    return rows


def _compared(
    net: torch.nn.Module,
    data: list[tuple[torch.Tensor, torch.Tensor]],
    where: object,
    of: str,
    margin: float,
    times: int,
) -> list[Row]:
    forwards: dict[str, list[float]] = {"search": [0.0, 0.0], "injection": [0.0, 0.0]}
    seconds = {"search": 0.0, "injection": 0.0}
    for seed in range(times):
        for by in sorted(seconds, reverse=bool(seed % 2)):
            began = time.perf_counter()
            found = fp.estimate_factors(net, data, where=where, margin=margin, by=by, seed=seed)  # type: ignore[arg-type]
            seconds[by] += time.perf_counter() - began
            forwards[by][0] += float(found["forwards"].sum())
            forwards[by][1] += float(found["forwards"].iloc[0])
    rows = []
    for what, place in (("all layers", 0), ("first layer", 1)):
        mine, other = forwards["search"][place], forwards["injection"][place]
        note = f"{other / times:,.0f} ÷ {mine / times:,.0f} forwards"
        rows.append(
            Row(f"digits CNN, {of}, ± {margin:g}, {what}: injection ÷ search, forwards", other / mine, note=note)
        )
    note = f"{seconds['injection'] / times:.2g} s ÷ {seconds['search'] / times:.2g} s"
    ratio = seconds["injection"] / seconds["search"]
    rows.append(Row(f"digits CNN, {of}, ± {margin:g}, all layers: injection ÷ search, seconds", ratio, note=note))
    return rows
