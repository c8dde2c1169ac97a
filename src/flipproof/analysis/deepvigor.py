"""DeepVigor: how large an error each neuron bears (Ahmadilivani et al. 2023), from searches instead of injections.

For a neuron, an input and a sign, the errors that its bit flips make are sorted by size; the first critical one is
found by galloping down from the largest and bisecting, on the assumption that larger errors of that sign stay critical.
Ranges then narrow the gap between the last harmless and the first critical error to `tolerance`. The assumption fails
now and then (the range has *holes*): a random sample of what was decided from it is injected, factors are corrected by
what that shows, and a layer where it fails too often is tried flip by flip.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flipproof.analysis._module_jobs import AnalysisHeader, ModuleJobs, check_run, in_order
from flipproof.analysis._two_phase import LEFT, PROVEN, TRIED, signed
from flipproof.analysis.layer_vulnerability import LayerVulnerability, ModuleVulnerability, distinct
from flipproof.analysis.opened_model import check_subject, opened
from flipproof.analysis.probes import ProbedSite, Prober
from flipproof.analysis.search import Search
from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.campaigns.statistics import wilson_interval
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import do_all
from flipproof.engine.journal import Journal, Key
from flipproof.errors import ConfigError
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice

KIND = "vulnerability analysis"
"""What the journal says it is of."""


@dataclass(frozen=True)
class DeepVigor:
    """The method and how thorough it is.

    Args:
        factors: "search" finds the first critical bit flip of each sign; "exhaustive" tries every bit of every neuron
            on every input (those that provably change nothing aside), so LVF, NVF and BVF are exact.
        ranges: also narrow the ranges between bit flips; without, they end at the flips that were tried.
        tolerance: relative width of the gap that may be left between harmless and critical errors.
        neurons: analyse at most so many neurons a layer, drawn without replacement; None takes all.
        gradient: the paper's step 1: a neuron with ∂L/∂a = 0, L = Σ_j σ(E_c − E_j), is called non-vulnerable for that
            input without asking. A heuristic (a neuron that a ReLU silences has no gradient, and may wake up), off by
            default; `holes` shows what it costs. For neurons of networks that can be traced.
        holes: random injections a layer, of what the search decided without trying, that look for holes: about so many,
            and at least 1 % of those flips. Factors are corrected by what they show and their intervals widened by what
            they leave unsure. 0 for none: intervals then hold whatever the untried flips could be.
        fallback: flips that the search has wrong ÷ flips that it calls critical: a layer where that is surely higher is
            analysed again with every flip tried, so that neurons and ranges are right too (not with `gradient`, which
            is wrong on purpose).
        max_bytes: bound on what the map keeps, and once more on what a round of questions works on. A map keeps
            4 · bits + 32 · classes bytes a neuron and a few dozen more, with as many classes as golden answers have.
        seed: of the neurons and the injections that are drawn.

    Raises:
        ConfigError: on arguments out of range.

    Example:
        >>> DeepVigor(neurons=100).tolerance
        0.05
    """

    factors: str = "search"
    ranges: bool = True
    tolerance: float = 0.05
    neurons: int | None = None
    gradient: bool = False
    holes: int = 512
    fallback: float = 0.05
    max_bytes: int = 2**28
    seed: int = 0

    def __post_init__(self) -> None:
        sound = self.factors in ("search", "exhaustive") and self.tolerance > 0 and self.holes >= 0 and self.seed >= 0
        sound = sound and self.fallback >= 0
        if not sound or (self.neurons is not None and self.neurons < 1) or self.max_bytes < 2**20:
            raise ConfigError(
                f"DeepVigor takes factors 'search' or 'exhaustive', tolerance > 0, neurons ≥ 1 or None, holes ≥ 0, "
                f"fallback ≥ 0, seed ≥ 0 and max_bytes ≥ 2**20, got {self!r}"
            )
        if self.gradient and self.factors == "exhaustive":
            raise ConfigError("gradient=True skips neurons, factors='exhaustive' tries every bit: choose one of them")


def analyze(
    model: nn.Module,
    data: Data,
    method: DeepVigor | None = None,
    *,
    format: FormatChoice = None,
    where: Neurons | Parameters | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    progress: bool | None = None,
    device: str | torch.device | None = None,
) -> VulnerabilityMap:
    """Which errors in which neurons, or in which weights, change the class, layer by layer.

    Args:
        model: any classifier; runs in eval mode where its parameters are, and comes back as it was.
        data: batches `(inputs, targets)`; only inputs matter, vulnerability is measured against the golden class.
        method: how thorough; `DeepVigor()` by default.
        format: how neuron outputs, or parameters, are stored, as in `assess`.
        where: which layers' outputs, `fp.Neurons(…)`; all Conv, Linear, LSTM and GRU modules by default. Or which
            weights, `fp.Parameters(…)`: the "layers" of the map are then parameters by qualified name ("conv1.weight"),
            and their "neurons" flat indices into them. Weights and biases of Conv and Linear layers are searched like
            neurons; other parameters cost a whole forward a question: sample them with `DeepVigor(neurons=…)`.
        output: picks the tensor to judge out of what the model returns.
        task: what the model is for, as for `assess`: a fault is critical if the task says that its answer is. Ranges
            are by golden class; tasks that know no classes have one.
        decision: how outputs become classes, as for `assess`.
        journal: file to write and resume, one JSON line a module. What is found does not depend on interruptions.
        workers: processes; each analyses a module at a time, and may work on `max_bytes` of its own. What is found does
            not depend on their number.
        client: see `assess`.
        progress: show a progress bar; None shows it on a terminal.
        device: where to run; None is where the model is.

    Raises:
        FlipproofError: one of its kinds, as for `assess`.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.eye(2)), net.bias.data.zero_()
        >>> found = fp.analyze(net, [(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))])
        >>> [found.classify("", 1, delta) for delta in (1.5, 2.5, -9.0)]  # 1 + 2.5 beats 3
        ['non_vulnerable', 'vulnerable', 'non_vulnerable']
    """
    method = DeepVigor() if method is None else method
    where = Neurons() if where is None else where
    if not isinstance(method, DeepVigor):
        raise ConfigError(f"analyze takes fp.DeepVigor(…) as its method, got {method!r}")
    check_subject("analyze", model, where, (Neurons, Parameters), format)
    if method.gradient and isinstance(where, Parameters):
        raise ConfigError("gradient=True is about neurons; analyse parameters without it")
    check_run("analyze", workers, journal)
    of = "parameters" if isinstance(where, Parameters) else "neurons"
    with opened(model, data, where, format, output, method.max_bytes, task_of(task, decision), device=device) as prober:
        labels = distinct(prober.classes)
        _check_room(prober, method, labels)

        def analysed(key: Key, sites: Sequence[ProbedSite]) -> ModuleVulnerability:
            found = tuple(_analyse(prober, site, method, labels) for site in sites)
            return ModuleVulnerability(str(key[0]), found)

        jobs = ModuleJobs(prober, analysed)
        header = AnalysisHeader.of(prober, method=repr(method), where=repr(where))
        file = Journal(journal, AnalysisHeader, ModuleVulnerability, kind=KIND) if journal is not None else None
        records = do_all(jobs, jobs.keys, header, file, workers=workers, client=client, progress=progress)
        by_site = {site.name: site for record in records.values() for site in record.sites}
        layers = in_order(by_site, prober, file)
        samples, digest = prober.batches.samples, prober.batches.digest()
        coverage, left_out = prober.coverage()
        known = prober.task
    found = VulnerabilityMap(
        layers,
        repr(method),
        samples,
        of=of,
        model=model,
        output=output,
        left_out=left_out,
        coverage=coverage,
        data=digest,
    )
    found.task = known
    return found


def _check_room(prober: Prober, method: DeepVigor, labels: Tensor) -> None:
    """Refuse a map that would be larger than `max_bytes`."""
    counts = [min(site.values, method.neurons or site.values) for site in prober.sites]
    classes = prober.judge.labels
    needed = sum(LayerVulnerability.room(s, n, classes, labels) for s, n in zip(prober.sites, counts, strict=True))
    if needed > method.max_bytes:
        raise ConfigError(
            f"a map of {sum(counts):,} places and {labels.numel()} golden classes keeps {needed / 2**20:,.1f} MiB, "
            f"max_bytes allows {method.max_bytes / 2**20:,.1f}: pass DeepVigor(max_bytes={needed}), analyse fewer with "
            f"neurons=, or fewer layers with where="
        )


def _analyse(prober: Prober, site: ProbedSite, method: DeepVigor, labels: Tensor) -> LayerVulnerability:
    before = replace(prober.costs)
    found = _asked(prober, site, method, labels, exhaustive=_everything(prober, site, method))
    if found is None:
        found = _asked(prober, site, method, labels, exhaustive=True)
    assert found is not None  # what is tried flip by flip has no holes
    found.probes, whole = prober.costs.probes - before.probes, prober.costs.whole - before.whole
    found.forwards = (found.probes - whole) * prober.suffix_share(site.name) + whole
    return found


def _everything(prober: Prober, site: ProbedSite, method: DeepVigor) -> bool:
    """Whether to try every flip: as the method says, or because the audit alone would come to most of them."""
    return method.factors == "exhaustive" or (not method.gradient and _rate(prober, site, method) == 1)


def _rate(prober: Prober, site: ProbedSite, method: DeepVigor) -> float:
    """The share of untried flips to inject; about a quarter of all flips of a layer are untried and unproved."""
    flips = prober.batches.samples * min(site.values, method.neurons or site.values) * site.width
    return min(1.0, max(0.01, 4 * method.holes / flips)) if method.holes else 0.0


def _asked(
    prober: Prober, site: ProbedSite, method: DeepVigor, labels: Tensor, *, exhaustive: bool
) -> LayerVulnerability | None:
    """One layer's answers; None as soon as the search turns out to be wrong too often."""
    draw = TrialGenerator(method.seed, f"DeepVigor {site.name}", 0)
    chosen = torch.arange(site.values)
    if method.neurons is not None and method.neurons < site.values:
        chosen = torch.from_numpy(draw.distinct(method.neurons, site.values))
    found = LayerVulnerability.empty(site, chosen, prober.judge.labels, labels)
    found.exhaustive = exhaustive
    rate = 0.0 if exhaustive else _rate(prober, site, method)
    # a dozen arrays of pairs × bits of 8 bytes are alive at once
    pairs = max(1, method.max_bytes // (100 * site.width))
    for batch, size in enumerate(prober.batches.sizes):
        probe = prober.at(site.name, batch)
        silent = probe.gradient() == 0 if method.gradient else None
        found.count(probe.classes)
        by_input = torch.zeros(size, site.width, dtype=torch.float64)
        for part in torch.split(torch.arange(chosen.numel()), pairs):
            for samples in torch.split(torch.arange(size), max(1, pairs // part.numel())):
                grid = (samples.numel(), part.numel())
                rows, places = samples.repeat_interleave(grid[1]), chosen[part].repeat(grid[0])
                search = Search(
                    probe,
                    rows,
                    places,
                    skip=None if silent is None else silent[rows, places],
                    exhaustive=exhaustive,
                    tolerance=method.tolerance,
                )
                critical = search.critical.reshape(*grid, -1)
                found.add(
                    probe.classes[samples],
                    part,
                    critical,
                    search.ranges(narrow=method.ranges).reshape(*grid, 4),
                    search.nans.sum(dim=1).reshape(*grid, 2),
                )
                answers = critical.double()
                if not exhaustive:
                    left, asked, wrong = (x.reshape(*grid, -1) for x in _audited(search, draw, rate))
                    found.add_audit(part, left, asked, wrong)
                    if rate and not method.gradient and _too_often(found, method.fallback):
                        return None
                    answers += signed(left, wrong, rate) if rate else 0.0
                by_input[samples] += answers.sum(dim=1)
                found.add_neurons(part, answers.mean(dim=2))
        found.add_inputs(by_input / chosen.numel())
        found.closed_form = probe.last
    return found


def _audited(search: Search, draw: TrialGenerator, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the search left untried, which of that was injected at this rate, and which it had wrong; (pairs, width)."""
    left = search.left.cpu()
    asked = torch.zeros_like(left, dtype=torch.bool)
    pair, bit = (left != TRIED).nonzero(as_tuple=True)
    some = torch.from_numpy(draw.bernoulli(rate, pair.numel()))
    asked[pair[some], bit[some]] = True
    return left, asked, (search.truth(asked).cpu() != search.critical) & asked


def _too_often(found: LayerVulnerability, allowed: float) -> bool:
    """Whether what the search has wrong surely comes to more than this share of what it calls critical."""
    if found.holes < 2:
        return False
    low, _ = wilson_interval(found.holes, found.tried, confidence=0.99)
    left = float(found.audit[:, LEFT, :PROVEN].sum())
    return low * left > allowed * max(float(found.critical.sum()), 1.0)
