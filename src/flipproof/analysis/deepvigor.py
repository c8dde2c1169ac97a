"""DeepVigor: how large an error each neuron bears (PAPERS: deepvigor), from searches instead of injections.

For a neuron, an input and a sign, the errors that its bit flips make are sorted by size; the first critical one is
found by galloping down from the largest and bisecting, on the assumption that larger errors of that sign stay critical.
Ranges then narrow the gap between the last harmless and the first critical error to `tolerance`. That the assumption
fails now and then (the range has *holes*) is measured by random injections a layer and reported, never hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan

import torch
from torch import Tensor, nn

from flipproof.analysis.probing import Layer, Prober
from flipproof.analysis.vulnerability import LayerVulnerability, VulnerabilityMap
from flipproof.campaigns.batches import Batches, Data, Output, call, read_batches
from flipproof.campaigns.evaluation import eval_mode, golden_run, one_thread
from flipproof.campaigns.neuron_trial import neuron_space
from flipproof.errors import ConfigError
from flipproof.faults.neurons import Neurons, NeuronSite, NeuronSpace
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.selection import FormatChoice
from flipproof.outcomes import Decision


@dataclass(frozen=True)
class DeepVigor:
    """The method and how thorough it is.

    Args:
        factors: "search" finds the first critical bit flip of each sign; "exhaustive" tries every bit of every neuron
            on every input (those that provably change nothing aside), so LVF, NVF and BVF are exact.
        ranges: also narrow the ranges between bit flips; without, they end at the flips that were tried.
        tolerance: relative width of the gap that may be left between harmless and critical errors.
        neurons: analyse at most so many neurons a layer, drawn without replacement; None takes all.
        holes: random injections a layer (of what the search decided without trying) that look for holes; 0 for none.
        max_bytes: bound on working memory, approximately.
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
    holes: int = 256
    max_bytes: int = 2**28
    seed: int = 0

    def __post_init__(self) -> None:
        sound = self.factors in ("search", "exhaustive") and self.tolerance > 0 and self.holes >= 0 and self.seed >= 0
        if not sound or (self.neurons is not None and self.neurons < 1) or self.max_bytes < 2**20:
            raise ConfigError(
                f"DeepVigor takes factors 'search' or 'exhaustive', tolerance > 0, neurons ≥ 1 or None, holes ≥ 0, "
                f"seed ≥ 0 and max_bytes ≥ 2**20, got {self!r}"
            )


def analyze(
    model: nn.Module,
    data: Data,
    method: DeepVigor | None = None,
    *,
    format: FormatChoice = None,
    where: Neurons | None = None,
    output: Output = None,
) -> VulnerabilityMap:
    """Which errors in which neurons change the class, layer by layer.

    Args:
        model: any classifier; runs in eval mode where its parameters are, and comes back as it was.
        data: batches `(inputs, targets)`; only inputs matter, vulnerability is measured against the golden class.
        method: how thorough; `DeepVigor()` by default.
        format: how neuron outputs are stored, as in `assess` with `where=fp.Neurons()`.
        where: which layers; all Conv, Linear, LSTM and GRU modules by default.
        output: picks the tensor to judge out of what the model returns.

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
    method = method or DeepVigor()
    if not isinstance(model, nn.Module) or not isinstance(method, DeepVigor):
        raise ConfigError(f"analyze takes a torch.nn.Module, data and fp.DeepVigor(), got {model!r} and {method!r}")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with eval_mode(model), one_thread(device):
        batches = read_batches(data, device)
        space = neuron_space(model, batches, where or Neurons(), format)
        with space.stored():
            golden = golden_run(model, batches, output)
            decision = Decision.from_golden(golden)
            prober = Prober(model, space, batches, output, golden, decision, method.max_bytes)
            share = _suffix_shares(model, batches, space, prober)
            layers = [_analyse(prober, site, method, decision.classes, share[site.name]) for site in space.sites]
    return VulnerabilityMap(layers, repr(method), batches.samples, model=model, output=output, data=batches.digest())


def _suffix_shares(model: nn.Module, batches: Batches, space: NeuronSpace, prober: Prober) -> dict[str, float]:
    """Multiplications behind each layer ÷ those of a forward: what a probe of it costs in forwards."""
    order: list[tuple[str, float]] = []
    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:

            def hook(
                module: nn.Module, args: object, result: object, name: str = name, weight: Tensor = weight
            ) -> None:
                if isinstance(result, Tensor):
                    order.append((name, result.numel() * weight[0].numel()))

            handles.append(module.register_forward_hook(hook))
    try:
        call(model, batches.inputs[0])
    finally:
        for handle in handles:
            handle.remove()
    total = sum(cost for _, cost in order)
    shares = {}
    for site in space.sites:
        place = next((i for i, (name, _) in enumerate(order) if name == site.layer), None)
        behind = sum(cost for _, cost in order[place + 1 :]) if place is not None else total
        shares[site.name] = behind / total if total and prober.traced else 1.0
    return shares


def _analyse(prober: Prober, site: NeuronSite, method: DeepVigor, classes: int, share: float) -> LayerVulnerability:
    draw = TrialGenerator(method.seed, f"DeepVigor {site.name}", 0)
    chosen = torch.arange(site.values)
    if method.neurons is not None and method.neurons < site.values:
        chosen = torch.from_numpy(draw.distinct(method.neurons, site.values))
    found = LayerVulnerability.empty(site, chosen, classes)
    before = prober.probes
    for batch, size in enumerate(prober.batches.sizes):
        layer = prober.at(site, batch)
        # a dozen arrays of samples × neurons × bits of 8 bytes are alive at once
        step = max(1, method.max_bytes // (100 * site.width * chosen.numel()))
        for first in range(0, size, step):
            samples = torch.arange(first, min(first + step, size))
            search = _Search(layer, site, samples, chosen, method)
            found.add(layer.classes[samples], search.critical, search.ranges())
            found.nans += search.nans()
            if method.holes:
                wanted = -(-method.holes * samples.numel() // prober.batches.samples)
                found.add_holes(*search.holes(draw, wanted))
        found.closed_form = layer.last
    found.probes = prober.probes - before
    found.forwards = found.probes * share
    return found


class _Search:
    """The searches of some samples × neurons of a layer, in lockstep: every round asks one question of each.

    Attributes:
        critical: which bits of which neurons are critical for which samples, bool (samples, neurons, bits).
    """

    def __init__(self, layer: Layer, site: NeuronSite, samples: Tensor, neurons: Tensor, method: DeepVigor) -> None:
        self._layer, self._site, self._method = layer, site, method
        device = layer.values.device
        self._size = (samples.numel(), neurons.numel())
        self._rows = samples.to(device).repeat_interleave(neurons.numel())
        self._neurons = neurons.to(device).repeat(samples.numel())
        self._golden = layer.values[self._rows, self._neurons]
        bits = torch.arange(site.width, device=device)
        self._faulty = site.flipped(self._golden[:, None].expand(-1, site.width).contiguous(), bits)
        self._delta = self._faulty.double() - self._golden.double()[:, None]
        self._flags = torch.zeros(self._faulty.shape, dtype=torch.bool, device=device)
        self._tried = torch.zeros_like(self._flags)
        everything = method.factors == "exhaustive" or layer.last
        # NaN and a changed sign of zero have no place in an order of errors: they are tried themselves
        self._try(torch.ones_like(self._flags) if everything else ~((self._delta > 0) | (self._delta < 0)))
        self._sides = [self._side(sign, everything) for sign in (1, -1)]

    @property
    def critical(self) -> Tensor:
        return self._flags.reshape(*self._size, -1).cpu()

    def nans(self) -> Tensor:
        """Flips that make a NaN, and those of them that are critical, over the samples; int64 (neurons, 2)."""
        made = torch.isnan(self._faulty)
        both = torch.stack([made.sum(dim=1), (made & self._flags).sum(dim=1)], dim=1)
        return both.reshape(*self._size, 2).sum(dim=0).cpu()

    def _try(self, which: Tensor) -> None:
        pair, bit = which.nonzero(as_tuple=True)
        self._flags[pair, bit] = self._ask(pair, self._faulty[pair, bit])
        self._tried |= which

    def _ask(self, pairs: Tensor, values: Tensor) -> Tensor:
        return self._layer.critical(self._rows[pairs], self._neurons[pairs], values)

    def _side(self, sign: int, everything: bool) -> tuple[Tensor, Tensor]:
        """Largest harmless and smallest critical error of this sign among the bit flips, as magnitudes; 0 and inf where
        there is none.
        """
        size = self._delta * sign
        member = size > 0
        order = torch.where(member, size, nan).sort(dim=1, stable=True)  # NaN sorts behind an error of +inf
        count = member.sum(dim=1)
        index = torch.arange(self._site.width, device=count.device)
        if everything:
            flags = self._flags.gather(1, order.indices) & (index < count[:, None])
            first = torch.where(flags.any(dim=1), flags.int().argmax(dim=1), count)
        else:
            first = self._first_critical(order.indices, count)
            flags = (index >= first[:, None]) & (index < count[:, None])
            self._flags |= torch.zeros_like(self._flags).scatter_(1, order.indices, flags)
        sizes = order.values
        harmless = torch.where(first > 0, sizes.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        last = sizes.shape[1] - 1
        critical = torch.where(first < count, sizes.gather(1, first.clamp(max=last)[:, None])[:, 0], inf)
        return harmless, critical

    def _first_critical(self, order: Tensor, count: Tensor) -> Tensor:
        """Index of the first critical flip in each row of `order`: gallop down from the largest, then bisect."""
        low, high = torch.zeros_like(count), count.clone()
        jump, galloping = torch.ones_like(count), torch.ones_like(count, dtype=torch.bool)
        while bool((active := (low < high).nonzero()[:, 0]).numel()):
            lo, hi = low[active], high[active]
            probe = torch.where(galloping[active], (hi - jump[active]).clamp(min=lo), (lo + hi) // 2)
            bit = order[active, probe]
            hit = self._ask(active, self._faulty[active, bit])
            self._tried[active, bit] = True
            high[active], low[active] = torch.where(hit, probe, hi), torch.where(hit, lo, probe + 1)
            jump[active] *= 2
            galloping[active] &= hit
        return high

    def ranges(self) -> Tensor:
        """Per pair: harmless down to, critical from there down, harmless up to, critical from there up, as errors;
        float64 (samples, neurons, 4).
        """
        parts = []
        for sign, (harmless, critical) in zip((-1, 1), self._sides[::-1], strict=True):
            near, far = self._narrowed(sign, harmless, critical) if self._method.ranges else (harmless, critical)
            parts += [sign * near, sign * far]
        return torch.stack(parts, dim=1).reshape(*self._size, 4).cpu()

    def _narrowed(self, sign: int, harmless: Tensor, critical: Tensor) -> tuple[Tensor, Tensor]:
        harmless, critical = harmless.clone(), critical.clone()
        top = torch.finfo(self._golden.dtype).max
        everyone = torch.arange(harmless.numel(), device=harmless.device)
        open_ended = everyone[torch.isinf(critical)]  # no finite error was critical yet: ask for the largest there is
        self._move(sign, open_ended, torch.full_like(harmless[open_ended], top), harmless, critical)
        for _ in range(40):
            wide = torch.isfinite(critical) & (critical > harmless.clamp(min=1e-30) * (1 + self._method.tolerance))
            active = everyone[wide]
            if not active.numel():
                break
            near, far = harmless[active], critical[active]
            middle = (near.clamp(min=1e-30).sqrt() * far.sqrt()).clamp(max=2 * top)
            # errors below the last place of the value are no errors: there is nothing between the two ends
            moved = self._move(sign, active, middle, harmless, critical)
            if not bool(moved.any()):
                break
        return harmless, critical

    def _move(self, sign: int, pairs: Tensor, middle: Tensor, harmless: Tensor, critical: Tensor) -> Tensor:
        """Ask for errors of about `middle`, and move one end of each range to what was really asked."""
        top = torch.finfo(self._golden.dtype).max
        golden = self._golden[pairs].double()
        values = (golden + sign * middle).clamp(-top, top).to(self._golden.dtype)
        asked = (values.double() - golden) * sign
        new = (asked > harmless[pairs]) & (asked < critical[pairs])
        pairs, values, asked = pairs[new], values[new], asked[new]
        hit = self._ask(pairs, values)
        critical[pairs[hit]] = asked[hit]
        harmless[pairs[~hit]] = asked[~hit]
        return new

    def holes(self, draw: TrialGenerator, wanted: int) -> tuple[int, int]:
        """Injections of flips that the search decided without trying: how many, and how many it had wrong."""
        pair, bit = (~self._tried).nonzero(as_tuple=True)
        if not pair.numel():
            return 0, 0
        some = torch.from_numpy(draw.below(pair.numel(), wanted)).to(pair.device)
        pair, bit = pair[some], bit[some]
        truth = self._layer.critical(self._rows[pair], self._neurons[pair], self._faulty[pair, bit], shortcuts=False)
        return wanted, int((truth != self._flags[pair, bit]).sum())
