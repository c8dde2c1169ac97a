"""Asking a network what one changed neuron does: many (sample, neuron, value) questions a forward, suffix only.

A probe puts a value into one neuron of one sample and looks at the class. Rows are gathered from the golden activations
right behind the layer, so each row of a batch has a change of its own and only the rest of the network runs. Where a
model cannot be traced, or its suffix does not give back the golden outputs bit by bit, whole forwards with a hook do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from flipproof.campaigns.batches import Batches, Output, call, pick
from flipproof.campaigns.suffix import Suffixes
from flipproof.faults.neurons import NeuronSite, NeuronSpace
from flipproof.faults.space import Site
from flipproof.outcomes import Decision, bit_pattern

ROWS = 512
"""Most rows of a probing batch: more does not run faster on a CPU."""

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)


Change = Callable[[Tensor], None]
"""Changes a layer's output in place; its rows are those that are asked about."""


class Prober:
    """Probes of one model on given batches; the space has to be `stored()` while it is used.

    Args:
        space: the neurons, with the formats of their values.
        batches: the inputs.
        golden: fault-free outputs of all samples, on the CPU.
        max_bytes: bound on the activations of a probing batch.
    """

    def __init__(
        self,
        model: nn.Module,
        space: NeuronSpace,
        batches: Batches,
        output: Output,
        golden: Tensor,
        decision: Decision,
        max_bytes: int,
    ) -> None:
        self.model, self.space, self.batches = model, space, batches
        self._output, self.decision = output, decision
        self.classes = decision.classes_of(golden)
        """Golden class of every sample."""
        self._golden = golden
        self._suffixes = None if space.repeated else Suffixes.trace(model, batches.inputs)
        # a layer's output is commonly held four times over: itself, normalised, activated, pooled or unfolded
        a_row = 16 * sum(site.values for site in space.sites)
        self.rows = max(1, min(ROWS, max_bytes // a_row))
        self.traced = self._suffixes is not None
        """Whether probes run only what lies behind their layer."""
        self.probes = 0
        """Rows that were run through a network so far."""
        self.recorded = (0, 0)
        """Rows of whole forwards and of suffixes that prepared and checked the suffixes so far."""

    @property
    def sites(self) -> tuple[NeuronSite, ...]:
        """The layers that can be asked about."""
        return self.space.sites

    def cuts(self, site: NeuronSite | Site) -> bool:
        """Whether questions about this layer run only what lies behind it."""
        return self.traced

    def at(self, site: NeuronSite, batch: int) -> Layer:
        """The questions one can ask of this layer about this batch."""
        first = sum(self.batches.sizes[:batch])
        size = self.batches.sizes[batch]
        suffix = self.suffix(site, batch)
        values = suffix.values if suffix is not None else self._values(site, batch)
        return Layer(self, site, batch, values, self.classes[first : first + size], suffix)

    def suffix(self, site: NeuronSite, batch: int) -> Suffix | None:
        """What runs behind this layer, or None where that does not reproduce the golden outputs."""
        first = sum(self.batches.sizes[:batch])
        golden = self._golden[first : first + self.batches.sizes[batch]]
        if self._suffixes is None or site.axis != 0:
            return None
        try:
            size = self.batches.sizes[batch]
            suffix = Suffix(self._suffixes, site, self.batches.inputs[batch], size)
            self.recorded = (self.recorded[0] + size, self.recorded[1] + 3 * size)
            rows = torch.arange(golden.shape[0], device=suffix.values.device)
            whole = pick(suffix.run(rows), self._output).cpu()
            turned = pick(suffix.run(rows.flip(0).repeat(2)), self._output).cpu()
        except Exception:  # what was traced cannot run like the model, in whatever way that shows: run the model
            return None
        same = whole.shape == golden.shape and torch.equal(bit_pattern(whole), bit_pattern(golden))
        backwards = self.classes_of(golden).flip(0).repeat(2)
        return suffix if same and torch.equal(self.classes_of(turned), backwards) else None

    def classes_of(self, outputs: Tensor) -> Tensor:
        """The class of each row; −1 where the output holds a NaN."""
        return self.decision.classes_of(outputs)

    def _values(self, site: NeuronSite, batch: int) -> Tensor:
        found: list[Tensor] = []

        def watch(seen: NeuronSite, output: Tensor) -> None:
            if seen.name == site.name:
                found.append(output.movedim(site.axis, 0).reshape(output.shape[site.axis], -1).clone())

        self.space.begin(batch)
        with self.space.changed(watch):
            call(self.model, self.batches.inputs[batch])
        return found[0]

    def whole(self, site: NeuronSite, batch: int, rows: Tensor, change: Change) -> Tensor:
        """Outputs of whole forwards on these rows of the batch with the layer's output changed."""
        size = self.batches.sizes[batch]
        inputs = pytree.tree_map(lambda leaf: rows_of(leaf, rows, size), self.batches.inputs[batch])

        def put(seen: NeuronSite, output: Tensor) -> Tensor | None:
            if seen.name != site.name:
                return None
            changed = output.clone()
            change(changed)
            return changed

        self.space.begin(batch)
        with self.space.changed(put):
            return pick(call(self.model, inputs), self._output)

    def outputs(self, raw: Any) -> Tensor:
        """The tensor to judge, on the CPU."""
        return pick(raw, self._output).cpu()


class Layer:
    """Probes of one layer on one batch.

    Attributes:
        values: golden outputs (samples, neurons).
        classes: golden class of each sample.
        last: True if nothing is computed behind the layer, so that a probe costs a comparison and no network.
    """

    def __init__(
        self, prober: Prober, site: NeuronSite, batch: int, values: Tensor, classes: Tensor, suffix: Suffix | None
    ) -> None:
        self._prober, self._site, self._batch, self._suffix = prober, site, batch, suffix
        self.values, self.classes = values, classes
        self.last = suffix is not None and suffix.last
        self._floor = suffix.floor() if suffix is not None else None

    def unseen(self, rows: Tensor, neurons: Tensor, values: Tensor) -> Tensor:
        """Where the next layers provably compute what they computed before: a ReLU, or a ReLU and a max pool, hides it.

        A value v' in place of v is unseen if relu(v') = relu(v), or if both are at most what else its pool sees.
        """
        if self._floor is None:
            return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        golden, floor = self.values[rows, neurons], self._floor[rows, neurons]
        after, before = values.clamp(min=0), golden.clamp(min=0)  # clamp keeps NaN, and NaN compares as False
        return (after == before) | ((after <= floor) & (before <= floor))

    def critical(self, rows: Tensor, neurons: Tensor, values: Tensor, *, shortcuts: bool = True) -> Tensor:
        """Whether each change gives another class, or a NaN; bool on the device of the values.

        Args:
            rows: samples of the batch, int64 (n,).
            neurons: flat indices, int64 (n,).
            values: what the neurons hold instead, (n,).
            shortcuts: skip what `unseen` proves; False runs everything.
        """
        result = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        ask = torch.arange(values.numel(), device=values.device)
        if shortcuts:
            ask = ask[~self.unseen(rows, neurons, values)]
        for part in torch.split(ask, self._prober.rows) if ask.numel() else ():
            raw = self._run(rows[part], neurons[part], values[part])
            found = self._prober.classes_of(self._prober.outputs(raw))
            result[part] = (found != self.classes[rows[part].cpu()]).to(result.device)
            self._prober.probes += 0 if self.last else part.numel()
        return result

    def gradient(self) -> Tensor:
        """∂L/∂a of every neuron for every sample, with L = Σ_j σ(E_c − E_j) (PAPERS: deepvigor, Eq. 1); NaN where the
        rest of the network cannot be differentiated; (samples, neurons).
        """
        unknown = torch.full_like(self.values, float("nan"))
        if self._suffix is None:
            return unknown
        held: list[Tensor] = []

        def hold(output: Tensor) -> None:
            held.append(output.detach().clone().requires_grad_())
            output.copy_(held[0])

        rows = torch.arange(self.values.shape[0], device=self.values.device)
        with torch.enable_grad():
            scores = self._prober.outputs(self._suffix.run(rows, hold)).double()
            if scores.dim() != 2 or scores.shape[1] < 2 or not scores.requires_grad:
                return unknown
            margins = scores.gather(1, self.classes[:, None]) - scores
            (gradient,) = torch.autograd.grad(margins.sigmoid().sum(), held[0])
        return gradient.reshape(self.values.shape)

    def flips(self, rows: Tensor, neurons: Tensor) -> Tensor:
        """What each neuron would hold with each bit of its word flipped; (n, bits)."""
        golden = self.values[rows, neurons][:, None].expand(-1, self._site.width).contiguous()
        return self._site.flipped(golden, torch.arange(self._site.width, device=golden.device))

    def _run(self, rows: Tensor, neurons: Tensor, values: Tensor) -> Any:
        def change(output: Tensor) -> None:
            output[self._site.index(torch.arange(rows.numel(), device=rows.device), neurons)] = values

        if self._suffix is not None:
            return self._suffix.run(rows, change)
        return self._prober.whole(self._site, self._batch, rows, change)


class Suffix:
    """What runs behind a layer, and the golden activations of a batch there."""

    def __init__(self, suffixes: Suffixes, site: NeuronSite, inputs: Any, size: int) -> None:
        nodes = suffixes._nodes
        self._node = next(n for n in nodes if n.op == "call_module" and str(n.target) == site.layer)
        cut = nodes.index(self._node) + 1
        self._live = suffixes._record(inputs, [cut])[cut]
        self._size = size
        self._place = suffixes._live(cut).index(self._node)
        self._graph = suffixes._part(cut)
        self.last = all(node.op in ("placeholder", "output") for node in self._graph.graph.nodes)
        self.shape = self._live[self._place].shape
        """Of the layer's output."""
        self.values: Tensor = self._live[self._place].reshape(size, -1)
        self._modules = dict(suffixes._traced.named_modules())

    def run(self, rows: Tensor, change: Change | None = None) -> Any:
        live = [pytree.tree_map(lambda leaf: rows_of(leaf, rows, self._size), value) for value in self._live]
        if change is not None:
            change(live[self._place])
        return self._graph(*live)

    def at(self, rows: Tensor) -> Tensor:
        """The golden output of the layer for these rows."""
        return self.values.reshape(self.shape).index_select(0, rows)

    @property
    def relu_behind(self) -> bool:
        """Whether a ReLU right behind the layer is all that reads it."""
        return self._only_user(self._node, nn.ReLU, _RELU_FUNCTIONS, "relu") is not None

    def floor(self) -> Tensor | None:
        """For each golden value, how high it may go unseen by the pool behind its ReLU; −inf without a pool, None
        without a ReLU right behind the layer.
        """
        relu = self._only_user(self._node, nn.ReLU, _RELU_FUNCTIONS, "relu")
        if relu is None:
            return None
        floor = torch.full_like(self.values, float("-inf"))
        kernel = self._pool_behind(relu)
        if kernel is None or len(self.shape) != 4:
            return floor
        samples, channels, height, width = self.shape
        tall, wide = height // kernel, width // kernel
        if not tall or not wide:
            return floor
        seen = self.values.reshape(self.shape)[:, :, : tall * kernel, : wide * kernel].clamp(min=0)
        windows = seen.reshape(samples, channels, tall, kernel, wide, kernel).transpose(3, 4)
        flat = windows.reshape(samples, channels, tall, wide, kernel * kernel)
        top = flat.topk(2, dim=-1).values
        # of two equal largest values each sees the other: the second is then as high as the first
        others = torch.where(flat == top[..., :1], top[..., 1:], top[..., :1])
        back = others.reshape(samples, channels, tall, wide, kernel, kernel).transpose(3, 4)
        result = torch.full(self.shape, float("inf"), dtype=floor.dtype, device=floor.device)  # in no window at all
        result[:, :, : tall * kernel, : wide * kernel] = back.reshape(seen.shape)
        return result.reshape(samples, -1)

    def _only_user(
        self, node: fx.Node, kind: type[nn.Module], functions: tuple[Any, ...], method: str
    ) -> fx.Node | None:
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        if user.args[:1] != (node,):
            return None
        if user.op == "call_module":
            module = self._modules[str(user.target)]
            return user if type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks) else None
        known = user.target in functions if user.op == "call_function" else user.target == method
        return user if known else None

    def _pool_behind(self, relu: fx.Node) -> int | None:
        """Kernel of a max pool with square windows side by side, without padding or dilation."""
        pool = self._only_user(relu, nn.MaxPool2d, _POOL_FUNCTIONS, "max_pool2d")
        if pool is None:
            return None
        if pool.op == "call_module":
            module: Any = self._modules[str(pool.target)]
            options = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
            options |= {"ceil_mode": module.ceil_mode, "return_indices": module.return_indices}
        else:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
            options = {**dict(zip(names, pool.args[1:], strict=False)), **pool.kwargs}
        kernel = _one(options.pop("kernel_size", None))
        stride = _one(options.pop("stride", None) or kernel)
        plain = _one(options.pop("padding", 0)) == 0 and _one(options.pop("dilation", 1)) == 1
        return kernel if kernel and kernel > 1 and kernel == stride and plain and not any(options.values()) else None


def _one(size: Any) -> int | None:
    """A square size as one number."""
    if isinstance(size, (tuple, list)):
        return size[0] if len(set(size)) == 1 and isinstance(size[0], int) else None
    return size if isinstance(size, int) else None


def rows_of(leaf: Any, rows: Tensor, size: int) -> Any:
    """These samples of a tensor of a batch of `size`; anything else as it is."""
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size:
        return leaf.index_select(0, rows)
    return leaf
