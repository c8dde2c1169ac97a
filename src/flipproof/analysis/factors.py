"""Vulnerability factors to a margin, from audited searches (Ahmadilivani et al. 2023, and its successor's goal)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, hypot, inf
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from flipproof._fields import Fields
from flipproof.analysis._drawn_inputs import drawn
from flipproof.analysis._module_jobs import AnalysisHeader, ModuleJobs, check_run, in_order
from flipproof.analysis._two_phase import (
    ASKED,
    CRITICAL,
    TRIED,
    WRONG,
    correction,
    counted,
    distances,
    signed,
    t_distance,
)
from flipproof.analysis.opened_model import check_subject, opened
from flipproof.analysis.probes import Probe, ProbedSite, Prober
from flipproof.analysis.search import Search
from flipproof.campaigns.statistics import Interval, half_width, mean_interval
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import do_all
from flipproof.engine.journal import Journal, Key
from flipproof.errors import ConfigError, FlipproofWarning
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.device import check_device, on_device
from flipproof.running.evaluation import eval_mode
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.running.tasks.recognise import read
from flipproof.running.tasks.settled import Settled
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice

KIND = "factor estimate"
"""What the journal says it is of."""

COLUMNS = (
    *("layer", "factor", "factor_low", "factor_high", "given_low", "given_high", "searched", "inputs", "pairs"),
    *("audited", "wrong", "forwards", "injections", "rival"),
)
"""What is found about one site."""

FIRST, INPUTS = 128, 64
"""Pairs of a place and an input to begin with, and the inputs among them."""


def estimate_factors(
    model: nn.Module,
    data: Data,
    *,
    where: Neurons | Parameters | None = None,
    format: FormatChoice = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    margin: float = 0.01,
    confidence: float = 0.95,
    by: str = "search",
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    progress: bool | None = None,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """The vulnerability factor of each layer or parameter to ± `margin`, from searches of random places and inputs.

    VF = the share of (place, input, bit) whose single flip changes the class, over inputs like those given.
    Statistical injection draws such triples. Here a pair (place, input) is drawn and all its bits are decided at once
    by DeepVigor's search, a few runs of what lies behind the layer. The search assumes that larger errors of a sign
    stay critical, which does not always hold; so a random sample of the flips that it decided without trying is
    injected after all, and the estimate corrected by what that shows (two-phase sampling): it is unbiased whatever the
    search assumed, for a given number of pairs. Pairs and injections are drawn until the interval is narrow enough;
    stopping then pulls estimates down a little, on average by about a twentieth of the margin.

    Args:
        model: any classifier, as for `analyze`.
        data: batches `(inputs, targets)`. Inputs are drawn at random, and nothing is computed about those that are not.
        where: `fp.Neurons(…)`, all by default, or `fp.Parameters(…)`.
        format: how they are stored.
        output: picks the tensor to judge out of what the model returns.
        task: what the model is for, as for `assess`.
        decision: how outputs become classes, as for `assess`.
        margin: half-width of the intervals.
        confidence: of the intervals.
        by: "search", or "injection" of one random bit of each pair, with the same inputs, rows, intervals and stopping
            rule. Which of the two is cheaper depends on network and margin: see benchmarks/README.md.
        seed: of the pairs and injections.
        journal: file to write and resume, one JSON line a module and number of inputs drawn. The table does not depend
            on interruptions.
        workers: processes; each works on a module at a time. The table does not depend on their number.
        client: see `assess`.
        progress: show a progress bar; None shows it on a terminal.
        device: where to run; None is where the model is.

    Returns:
        One row a layer: `factor` with `factor_low` and `factor_high`, which speak of the population that the inputs
        were taken from (inputs are clusters of pairs); `given_low` and `given_high`, of the inputs given alone. Both
        hold what unseen pairs, and flips that were not injected, could change. `searched`: the factor as the search
        alone has it. `inputs` and `pairs` drawn, `audited` flips and the share of them that was `wrong`. `forwards`:
        what all that took (rows through what lies behind the layer, weighed by multiplications; rows that recorded and
        checked the golden run; the layer's part of the golden run itself). `injections`: how many random injections the
        same stopping rule needs for the same margin if the factor is what was found, and `fewer` = their forwards, with
        the same set-up and through the same rest of the network, ÷ `forwards`. What they do not speak of is in
        `.attrs["left_out"]` and `.attrs["coverage"]`, as of a `VulnerabilityMap`.

    Raises:
        ConfigError: on a margin or confidence outside (0, 1), or another `by`.
        FlipproofError: one of its kinds, as for `analyze`.

    Warns:
        FlipproofWarning: if so few inputs cannot speak of their population to ± `margin`, with how many it takes. Pairs
            are then drawn until `given_low` and `given_high` are narrow enough.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = estimate_factors(net, [(torch.randn(500, 4), torch.zeros(500))], margin=0.02)
        >>> found["layer"].tolist(), bool(((found["factor_high"] - found["factor_low"]) <= 0.04).all())
        (['0', '2'], True)
    """
    if not 0 < margin < 1 or not 0 < confidence < 1:
        raise ConfigError(f"estimate_factors takes margin and confidence in (0, 1), got {margin!r} and {confidence!r}")
    check_subject("estimate_factors", model, Neurons() if where is None else where, (Neurons, Parameters), format)
    if by not in ("search", "injection"):
        raise ConfigError(f"estimate_factors goes by 'search' or 'injection', got {by!r}")
    check_run("estimate_factors", workers, journal)
    kind = _Pairs if by == "search" else _InjectedPairs
    target = check_device(model, device)
    where = Neurons() if where is None else where
    file = Journal(journal, AnalysisHeader, ModuleFactors, kind=KIND) if journal is not None else None
    header: AnalysisHeader | None = None
    with on_device(model, target), eval_mode(model):
        everything, known, reading = read(model, data, target, task_of(task, decision), output)
    most, spent = _inputs_for(margin), np.zeros(0)
    while True:
        batches, order = drawn(everything, most, seed)
        with opened(model, batches.pairs, where, format, reading, 2**28, Settled(known), device=target) as prober:
            if header is None:
                settings = {"margin": margin, "confidence": confidence, "by": by, "seed": seed, "where": repr(where)}
                header = AnalysisHeader.of(prober, inputs=everything.digest(), **settings)
            jobs = _jobs(prober, kind, order, margin, confidence, seed)
            records = do_all(jobs, jobs.keys, header, file, workers=workers, client=client, progress=progress)
            by_site = {str(row["layer"]): row for record in records.values() for row in record.rows}
            rows = in_order(by_site, prober, file)
            coverage, left_out = prober.coverage()
        found = pd.DataFrame(rows)
        found["forwards"] += spent if spent.size else 0.0
        if most >= everything.samples or not (_halves(found) > margin).any():
            break
        most, spent = 4 * most, found["forwards"].to_numpy()
    _warn(found, margin)
    found["fewer"] = found.pop("rival") / found["forwards"].clip(lower=1e-12)
    found.attrs.update(coverage=coverage, left_out=left_out)
    return found


@dataclass(frozen=True)
class ModuleFactors:
    """The factors of the sites of one module: one line of the journal of `estimate_factors`.

    Attributes:
        inputs: how many inputs could be drawn.
        module: qualified name.
        rows: of the table, one a site.
    """

    inputs: int
    module: str
    rows: tuple[dict[str, Any], ...]

    @property
    def key(self) -> tuple[int, str]:
        """Which job it was."""
        return (self.inputs, self.module)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"inputs": self.inputs, "module": self.module, "rows": list(self.rows)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> ModuleFactors:
        """The inverse of `to_json`."""
        about = Fields(record, "a module")
        found = cls(about.whole("inputs"), about.text("module"), about.each("rows", _read_row))
        about.end()
        return found


def _read_row(about: Fields) -> dict[str, Any]:
    counts = ("inputs", "pairs", "audited", "injections")
    return {
        name: about.text(name) if name == "layer" else about.whole(name) if name in counts else about.number(name)
        for name in COLUMNS
    }


def _jobs(
    prober: Prober, kind: type[_Pairs], order: Tensor, margin: float, confidence: float, seed: int
) -> ModuleJobs[ModuleFactors]:
    """One job a module: pairs of its sites until the margin is met."""
    layers = len(prober.sites)

    def estimated(key: Key, sites: Sequence[ProbedSite]) -> ModuleFactors:
        rows = tuple(kind(prober, site, order, confidence, seed).row(margin, layers) for site in sites)
        return ModuleFactors(int(key[0]), str(key[1]), rows)

    return ModuleJobs(prober, estimated, (int(order.numel()),))


def _inputs_for(margin: float) -> int:
    """Inputs to begin with: enough where factors of single inputs scatter by 0.05, as they mostly do."""
    return max(2 * INPUTS, ceil((2 * 0.05 / margin) ** 2))


def _halves(found: pd.DataFrame) -> pd.Series:
    return (found["factor_high"] - found["factor_low"]) / 2


def _warn(found: pd.DataFrame, margin: float) -> None:
    halves = _halves(found)
    if not (missed := halves > margin * (1 + 1e-9)).any():
        return
    worst, half = found.iloc[int(halves.argmax())], float(halves.max())
    warnings.warn(
        f"{worst['inputs']} inputs do not say more about their population than ± {half:.2g} ({worst['layer']}; "
        f"{int(missed.sum())} of {len(found)} layers miss the margin {margin:g}). About "
        f"{ceil(worst['inputs'] * (half / margin) ** 2)} inputs would do; given_low and given_high speak of the inputs "
        f"given alone",
        FlipproofWarning,
        stacklevel=3,
    )


class _Pairs:
    """Pairs of a place of one site and an input, drawn so far, and what was injected of them."""

    def __init__(
        self,
        prober: Prober,
        site: ProbedSite,
        order: Tensor,
        confidence: float,
        seed: int,
    ) -> None:
        self._prober, self._site, self._order, self._confidence = prober, site, order, confidence
        self._share = prober.suffix_share(site.name)
        self._draw = TrialGenerator(seed, f"factors {site.name}", 0)
        self._opened: dict[int, Probe] = {}
        width = self._width(site)
        self._place, self._input = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        self._inputs = self._times = 0
        """Inputs so far, and pairs of each."""
        self._flags, self._asked, self._wrong = (torch.zeros(0, width, dtype=torch.bool) for _ in range(3))
        self._left = torch.zeros(0, width, dtype=torch.int8)
        self._keys = torch.zeros(0, width, dtype=torch.float64)
        """A random number in [0, 1) for each flip: those below `self._rate` are injected."""
        self._rate = 0.0

    @staticmethod
    def _width(site: ProbedSite) -> int:
        """Answers a pair gives."""
        return site.width

    @property
    def pairs(self) -> int:
        return self._place.numel()

    def row(self, margin: float, layers: int) -> dict[str, Any]:
        """Draw until the margin is met, and say what was found."""
        prober = self._prober
        before = replace(prober.costs)
        self._inputs = min(INPUTS, self._order.numel())
        self._times = ceil(FIRST / self._inputs)
        self._fill()
        # as many injections, without one wrong, as leave the margin room for the scatter over pairs
        while True:
            searched, given = self._searched()
            room = 0.8 * margin
            if half_width(searched) > room and not (half_width(given) <= room and self._inputs_are_short(margin)):
                self._more_pairs()
                continue
            if not self._rate:
                self._audit(4.4 / (margin * self._flags.numel()))
            low, high, given_low, given_high, off = self._intervals()
            short = self._inputs_are_short(margin)
            if (high - low) / 2 <= margin or ((given_high - given_low) / 2 <= margin and short):
                break
            if off > 0.5 * margin and self._rate < 1:
                self._audit(1.5 * self._rate)
            else:
                self._more_pairs()
        after = prober.costs
        golden = (2 * prober.batches.samples + prober.batches.sizes[0]) / layers
        set_up = golden + (after.preparing - before.preparing) + (after.checking - before.checking) * self._share
        forwards = set_up + (after.probes - before.probes) * self._share
        factor = self._factor()
        injections = injections_for(factor, margin, self._confidence)
        kinds = counted(self._left, self._asked, self._wrong)[:, : CRITICAL + 1].sum(dim=(1, 2)).tolist()
        self._opened.clear()
        return {
            "layer": self._site.name,
            "factor": factor,
            "factor_low": low,
            "factor_high": high,
            "given_low": given_low,
            "given_high": given_high,
            "searched": float(self._flags.double().mean()),
            "inputs": self._inputs,
            "pairs": self.pairs,
            "audited": kinds[ASKED],
            "wrong": kinds[WRONG] / kinds[ASKED] if kinds[ASKED] else 0.0,
            "forwards": forwards,
            "injections": injections,
            "rival": set_up + injections * self._share,
        }

    def _factor(self) -> float:
        counts = counted(self._left, self._asked, self._wrong)
        found = float(self._flags.sum()) + float(correction(counts).sum())
        return min(max(found / self._flags.numel(), 0.0), 1.0)

    def _searched(self) -> tuple[Interval, Interval]:
        """Intervals of the mean of what the search says, over inputs and over the inputs given."""
        values = self._flags.double().mean(dim=1).numpy()
        given = mean_interval(values, confidence=self._confidence, bounds=(0.0, 1.0))
        half = t_distance(self._by_input(values), self._confidence)
        mean = float(values.mean())
        whole = (min(given[0], max(0.0, mean - half)), max(given[1], min(1.0, mean + half)))
        return whole, given

    def _intervals(self) -> tuple[float, float, float, float, float]:
        """Low and high over the population and over the inputs given, and how much of them the audit leaves unsure."""
        flips, factor, confidence = self._flags.numel(), self._factor(), self._confidence
        counts = counted(self._left, self._asked, self._wrong)
        below, above = (flips_off / flips for flips_off in distances(counts, confidence=confidence))
        values = self._flags.double().mean(dim=1).numpy()
        found = self._wrong_by_pair()
        mean = float(values.mean())
        ends = []
        for interval, groups in zip(
            self._searched()[:2], (self._by_input(values + found), values + found), strict=True
        ):
            half = t_distance(groups, confidence)  # holds what inputs with many wrong decisions have in common
            ends.append(max(0.0, factor - max(half, hypot(mean - interval[0], below))))
            ends.append(min(1.0, factor + max(half, hypot(interval[1] - mean, above))))
        return ends[0], ends[1], ends[2], ends[3], (below + above) / 2

    def _wrong_by_pair(self) -> NDArray[np.float64]:
        if not self._rate:
            return np.zeros(self.pairs)
        found: NDArray[np.float64] = signed(self._left, self._wrong, min(self._rate, 1.0)).mean(dim=1).numpy()
        return found

    def _grid(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of pairs as (inputs, pairs of each)."""
        return values[np.argsort(self._input.numpy(), kind="stable")].reshape(self._inputs, self._times)

    def _by_input(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        means: NDArray[np.float64] = self._grid(values).mean(axis=1)
        return means

    def _scatter(self) -> tuple[float, float]:
        """The variance of the factor's estimate that comes from the choice of inputs, and from that of places."""
        values = self._grid(self._flags.double().mean(dim=1).numpy() + self._wrong_by_pair())
        within = float(values.var(axis=1, ddof=1).mean()) / values.size
        if self._inputs < 2:
            return inf, within
        return max(0.0, float(values.mean(axis=1).var(ddof=1)) / self._inputs - within), within

    def _inputs_are_short(self, margin: float) -> bool:
        """Whether no number of pairs makes the interval over the population narrow enough: inputs scatter too much."""
        if self._inputs < self._order.numel():
            return False
        if self._inputs < 2:
            return True
        t = float(stats.t.ppf((1 + self._confidence) / 2, self._inputs - 1))
        return bool(t * self._scatter()[0] ** 0.5 > 0.9 * margin)

    def _more_pairs(self) -> None:
        """More inputs, if they scatter more than places do and there are some left, else one more place of each."""
        between, within = self._scatter()
        there = self._order.numel()
        if between > within and self._inputs < there:
            self._inputs = min(there, self._inputs + ceil(self._inputs / 3))
        else:
            self._times += 1
        self._fill()

    def _fill(self) -> None:
        """Draw and search the pairs that are missing for every input to have its number of them."""
        times = torch.full((self._inputs,), self._times)
        if self.pairs:
            times -= torch.bincount(self._input, minlength=self._inputs)
        new = torch.repeat_interleave(torch.arange(self._inputs), times)
        many = new.numel()
        place = torch.from_numpy(self._draw.below(self._site.values, many))
        flags, left = self._answers(self._order[new], place)
        keys = torch.from_numpy(self._draw.below(2**53, flags.numel())).double() / 2**53
        nothing = torch.zeros_like(flags)
        self._input, self._place = torch.cat([self._input, new]), torch.cat([self._place, place])
        self._flags, self._left = torch.cat([self._flags, flags]), torch.cat([self._left, left])
        self._asked, self._wrong = torch.cat([self._asked, nothing]), torch.cat([self._wrong, nothing])
        self._keys = torch.cat([self._keys, keys.reshape(many, -1)])
        if self._rate:
            self._audit(self._rate)

    def _answers(self, sample: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Which flips of new pairs are critical, and what was left untried of them."""
        flags = torch.zeros(place.numel(), self._site.width, dtype=torch.bool)
        left = torch.zeros(place.numel(), self._site.width, dtype=torch.int8)
        for batch, here, rows in self._prober.by_batch(sample):
            search = Search(self._at(batch), rows, place[here])
            flags[here], left[here] = search.critical, search.left.cpu()
        return flags, left

    def _audit(self, rate: float) -> None:
        """Inject each flip that the search left untried with this probability; those drawn before stay drawn."""
        self._rate = min(rate, 1.0)
        which = (self._left != TRIED) & (self._keys < self._rate) & ~self._asked
        pair = which.any(dim=1).nonzero()[:, 0]
        sample = self._order[self._input[pair]]
        for batch, here, rows in self._prober.by_batch(sample):
            mine = pair[here]
            truth = Search(self._at(batch), rows, self._place[mine], decide=False).truth(which[mine])
            self._wrong[mine] |= (truth.cpu() != self._flags[mine]) & which[mine]
        self._asked |= which

    def _at(self, batch: int) -> Probe:
        if batch not in self._opened:
            self._opened[batch] = self._prober.at(self._site.name, batch)
        return self._opened[batch]


class _InjectedPairs(_Pairs):
    """Random injections: one random bit of each pair is tried, and nothing is assumed."""

    @staticmethod
    def _width(site: ProbedSite) -> int:
        return 1

    def _answers(self, sample: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        bit = torch.from_numpy(self._draw.below(self._site.width, place.numel()))
        flags = torch.zeros(place.numel(), 1, dtype=torch.bool)
        for batch, here, rows in self._prober.by_batch(sample):
            probe = self._at(batch)
            device = probe.values.device
            rows, mine = rows.to(device), place[here].to(device)
            flips = probe.flips(rows, mine).gather(1, bit[here].to(device)[:, None])[:, 0]
            flags[here, 0] = probe.critical(rows, mine, flips).cpu()
        return flags, torch.full_like(flags, TRIED, dtype=torch.int8)


def injections_for(rate: float, margin: float, confidence: float = 0.95) -> int:
    """How many random injections `mean_interval` needs for ± `margin` where this share of them is critical.

    Example:
        >>> injections_for(0.5, 0.01) > injections_for(0.05, 0.01) > 300
        True
    """

    def enough(n: int) -> bool:
        hits = round(rate * n)
        outcomes = np.zeros(n)
        outcomes[:hits] = 1.0
        return half_width(mean_interval(outcomes, confidence=confidence, bounds=(0.0, 1.0))) <= margin

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
