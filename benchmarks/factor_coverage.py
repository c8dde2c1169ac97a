"""Estimated factors against those of exhaustive injection, over many draws of inputs: bias and coverage.

`python -m benchmarks.factor_coverage` (or `make factor-coverage`) prints the table of benchmarks/README.md. A network
is small enough for every bit of every neuron to be injected for a population of inputs. Then samples of these inputs
are drawn again and again, and `estimate_factors` and `analyze` say what they say from each sample. All networks but the
plain one can have holes: errors that are critical while larger ones of the same sign are not.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import flipproof as fp

POPULATION = 3000


class Bounded(nn.Module):
    """Gives zero where an activation is above a bound (as FT-ClipAct and Guard do), or negative."""

    def __init__(self, bound: float, both_signs: bool = False) -> None:
        super().__init__()
        self.bound, self.both_signs = bound, both_signs

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs() if self.both_signs else x
        inside = (size <= self.bound) & (self.both_signs | (x > 0))
        return torch.where(inside, x, torch.zeros_like(x))


class Residual(nn.Module):
    """A clamped skip connection around a saturating branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h.clamp(-3, 3) + torch.tanh(self.inner(torch.relu(h))))


class Normalised(nn.Module):
    """A residual block between normalisations: a huge error leaves one direction and takes all others away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.inner, self.last = (
            nn.Linear(6, 10),
            nn.LayerNorm(10),
            nn.Linear(10, 10),
            nn.Linear(10, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.norm(h + self.inner(torch.relu(self.norm(h)))))


def network(kind: str) -> nn.Module:
    torch.manual_seed(2)
    if kind == "residual":
        return Residual().eval()
    if kind == "normalised":
        return Normalised().eval()
    made = {
        "plain ReLU": (nn.ReLU(), nn.ReLU()),
        "saturating": (nn.Hardtanh(), nn.Tanh()),
        "zero above 2": (Bounded(2.0), Bounded(1.5)),
        "zero beyond 1e5": (Bounded(1e5, both_signs=True), nn.ReLU()),
    }[kind]
    return nn.Sequential(nn.Linear(6, 10), made[0], nn.Linear(10, 8), made[1], nn.Linear(8, 4)).eval()


KINDS = ("plain ReLU", "saturating", "zero above 2", "zero beyond 1e5", "residual", "normalised")


def table(runs: int, inputs: int, few: int, margin: float) -> pd.DataFrame:
    """One row a network and layer.

    Args:
        runs: samples of inputs drawn.
        inputs: inputs in a sample for `estimate_factors`.
        few: inputs in a sample for `analyze`.
        margin: of `estimate_factors`.
    """
    rows = []
    for kind in KINDS:
        net = network(kind)
        x = 1.5 * torch.randn(POPULATION, 6, generator=torch.Generator().manual_seed(1))
        names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][:-1]
        where = fp.Neurons(include=tuple(names))
        exact = fp.DeepVigor(factors="exhaustive", ranges=False)
        truth = fp.analyze(net, [(x, torch.zeros(POPULATION))], exact, where=where)
        lvf = truth.layers["lvf"].to_numpy()
        draw = np.random.default_rng(0)
        estimates, maps, plain = [], [], []
        for run in range(runs):
            some = torch.from_numpy(draw.choice(POPULATION, inputs, replace=False))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fp.FlipproofWarning)
                found = fp.estimate_factors(net, [(x[some], torch.zeros(inputs))], where=where, margin=margin, seed=run)
            estimates.append(found)
            some = some[:few]
            method = fp.DeepVigor(ranges=False, fallback=1e9, seed=run)
            maps.append(fp.analyze(net, [(x[some], torch.zeros(few))], method, where=where))
            plain.append(fp.analyze(net, [(x[some], torch.zeros(few))], exact, where=where))
        for i, name in enumerate(names):
            mine = pd.DataFrame([found.iloc[i] for found in estimates])
            error = mine["factor"].astype(float).std() / runs**0.5
            rows.append(
                {
                    "network": kind,
                    "layer": name,
                    "exhaustive": lvf[i],
                    "search alone": mine["searched"].mean(),
                    "estimated": mine["factor"].mean(),
                    "bias in standard errors": (mine["factor"].mean() - lvf[i]) / error,
                    "covered": _covered(mine["factor_low"], lvf[i], mine["factor_high"]),
                    "covered by maps": _covered(*_ends(maps, i, lvf[i])),
                    "by exhaustive maps": _covered(*_ends(plain, i, lvf[i])),
                    "audited of questions": float((mine["audited"] / (mine["audited"] + 6 * mine["pairs"])).mean()),
                }
            )
    return pd.DataFrame(rows)


def _covered(low: object, truth: float, high: object) -> float:
    return float(((np.asarray(low, float) <= truth) & (truth <= np.asarray(high, float))).mean())


def _ends(maps: list[fp.VulnerabilityMap], layer: int, truth: float) -> tuple[list[float], float, list[float]]:
    rows = [found.layers.iloc[layer] for found in maps]
    return [row["lvf_low"] for row in rows], truth, [row["lvf_high"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.factor_coverage", description=__doc__)
    parser.add_argument("--runs", type=int, default=120)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--few", type=int, default=32)
    parser.add_argument("--margin", type=float, default=0.02)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = table(given.runs, given.inputs, given.few, given.margin)
    print("| " + " | ".join(found.columns) + " |\n|" + "---|" * len(found.columns))
    for row in found.itertuples(index=False):
        print("| " + " | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row) + " |")


if __name__ == "__main__":
    main()
