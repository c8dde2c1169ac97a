"""Skipping the fault-free prefix: a trial starts at the first layer that a fault touched.

Everything before that layer computes what the golden run computed, so its activations are kept (within a budget) and
only the rest of the network runs. `torch.fx` gives the order. A model is traced only if its code is straight
(`straight`), so that faults cannot lead it anywhere that the trace does not know; where that is not so, or a resumed
run does not give back the golden outputs bit by bit, trials run whole. Records are the same either way.

A third of all single faults in weights is gone a layer or two later: rounded away, or stopped by a ReLU. So a trial
looks at the next cuts behind its last faulted layer, and where every live value is golden, bit by bit, so is the rest.

A fault in one filter of a convolution changes one channel of its output. Where a block of channels computed by itself
is, bit by bit, what the whole layer gives (its sums are taken in the same order), only that block is computed. An upset
in an image changes a window of what follows, which is computed by itself under the same condition (`windows`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof.running.data import Output, call, own, pick
from flipproof.running.device import device_of
from flipproof.running.evaluation import eval_mode, one_thread
from flipproof.running.row_wise import row_wise
from flipproof.running.snapshots import Snapshot
from flipproof.running.straight import global_hooks, refers_to_tensors, run_straight
from flipproof.running.tracing import Tracer
from flipproof.running.values import PLAIN, Copies, bytes_of, copied, same, separate
from flipproof.running.windows import Windows, changed_window, put
from flipproof.spaces.packed_params import set_aside
from flipproof.spaces.quantised import parts

T = TypeVar("T")

_BLOCK = 16
"""Channels of a block: what a vector unit computes together, so that libraries take the same way through fewer."""

_LOOKS = 2
"""How many cuts behind the last faulted layer to look at: its own output, and what its activation made of that."""


class Suffixes:
    """Cached activations at chosen cuts of a traced model, and the subgraphs that run from there.

    A cut is an index into the graph's nodes; 0 means the whole model.
    """

    def __init__(
        self, model: nn.Module, traced: fx.GraphModule, first_use: dict[str, int], last_use: dict[str, int]
    ) -> None:
        self._model = model
        self._traced = traced
        self._nodes: list[fx.Node] = list(traced.graph.nodes)
        self._first_use = first_use
        self._last_use = last_use
        self._graphs: dict[int, fx.GraphModule] = {}
        self._steps: dict[tuple[int, int], fx.GraphModule] = {}
        self._golden: list[Any] = []
        self._caches: dict[int, list[list[Any]]] = {}
        self._cuts: list[int] = []
        self._by_channels: dict[int, nn.Conv2d] = {}
        self._windows: dict[int, Windows] = {}
        self._images: list[dict[fx.Node, Tensor]] = []
        self._points: dict[str, tuple[int, fx.Node, bool]] = {}
        self._inputs: Sequence[Any] = ()
        self._row_wise: frozenset[fx.Node] | None = None
        self._prepared: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Callable[..., Suffixes | None], tuple[Any, ...]]:
        """In another process the model is traced and run anew; `torch.fx` would pickle buffers as constants."""
        return _traced_again, (type(self), self._model, self._inputs, self._prepared)

    @classmethod
    def trace(cls, model: nn.Module, inputs: Sequence[Any]) -> Suffixes | None:
        """Trace a model in eval mode for these batches; None where that would not be faithful."""
        tracer = Tracer()
        if any(global_hooks()):
            return None
        if any(_is_opaque(m, m is model or not tracer.is_leaf_module(m, "")) for m in model.modules()):
            return None
        state = Snapshot(model, like=model)  # tracing writes no values, but stand-ins into attributes
        try:
            fixed = _fixed(model, inputs)
            graph = run_straight(lambda: tracer.trace(model, concrete_args=fixed))
            traced = fx.GraphModule(model, graph)
        except Exception:  # a forward that cannot be traced may raise anything; whole runs need no trace
            return None
        finally:
            wrote = state.restore()
        if wrote or any(
            node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in traced.graph.nodes
        ):
            return None  # computed while tracing, perhaps from a parameter: faults would not reach it
        first_use: dict[str, int] = {}
        last_use: dict[str, int] = {}
        modules = dict(model.named_modules())
        for index, node in enumerate(traced.graph.nodes):
            names: list[str] = []
            if node.op == "get_attr":
                names = [str(node.target)]
            elif node.op == "call_module":
                held = modules[str(node.target)]
                inside = [
                    *(name for name, _ in held.named_parameters(remove_duplicate=False)),
                    *(name for name, _ in held.named_buffers(remove_duplicate=False)),
                    *(f"{part}.{key}".lstrip(".") for part, m in held.named_modules() for key in set_aside(m)),
                ]
                names = [f"{node.target}.{name}" for name in inside]
            for name in names:
                first_use.setdefault(name, index)
                last_use[name] = index
        for together in sharing_memory(model, first_use):
            first_use |= dict.fromkeys(together, min(first_use[name] for name in together))
            last_use |= dict.fromkeys(together, max(last_use[name] for name in together))
        found = cls(model, traced, first_use, last_use)
        found._inputs = inputs
        return found

    def cut_of(self, names: Sequence[str]) -> int:
        """The latest prepared cut that lies before the first use of any of these tensors (with all their names)."""
        uses = [self._first_use.get(name, 0) for name in names]
        earliest = min(uses, default=0)
        return max((cut for cut in self._cuts if cut <= earliest), default=0)

    def looks_after(self, names: Sequence[str]) -> tuple[int, ...]:
        """The next prepared cuts that lie behind every use of these tensors: where their faults may be gone."""
        latest = max((self._last_use.get(name, len(self._nodes)) for name in names), default=len(self._nodes))
        return tuple(cut for cut in self._cuts if cut > latest)[:_LOOKS]

    def behind(self, layer: str, call: int = 0, calls: int = 1) -> int | None:
        """The cut right behind a call of a module.

        None if the graph does not call it `calls` times, or nothing reads what this call gives.
        """
        found = [i for i, node in enumerate(self._nodes) if node.op == "call_module" and str(node.target) == layer]
        return found[call] + 1 if len(found) == calls and self._nodes[found[call]].users else None

    def only_use(self, names: Sequence[str]) -> int | None:
        """The cut right before the one call of a module that reads these tensors (with all their names); None if more
        than that reads them.
        """
        uses = {(self._first_use.get(name), self._last_use.get(name)) for name in names}
        first, last = uses.pop() if len(uses) == 1 else (None, None)
        return first if first is not None and first == last and self._nodes[first].op == "call_module" else None

    def row_wise_from(self, cut: int) -> bool:
        """Whether every step from a cut on gives each sample of the first batch what it alone makes of it."""
        if self._row_wise is None:
            arguments = list(_arguments(self._model, own(self._inputs[0])).values())
            sizes = {len(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()}
            self._row_wise = row_wise(self._traced, arguments, sizes.pop()) if len(sizes) == 1 else frozenset()
        return all(node in self._row_wise for node in self._nodes[cut:])

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """Of the graph, in order."""
        return self._nodes

    def point(self, node: fx.Node, argument: int | None) -> tuple[int, fx.Node] | None:
        """(cut, node) at which a value that this node gives, or takes as this argument, can be changed.

        None if nothing reads what it gives, or something else reads what it takes.
        """
        index = self._nodes.index(node)
        if argument is None:
            return (index + 1, node) if node.users else None
        given = node.args[argument] if argument < len(node.args) else None
        if not isinstance(given, fx.Node) or sum(one is given for one in [*node.args, *node.kwargs.values()]) != 1:
            return None
        later = [user for user in given.users if self._nodes.index(user) >= index]
        return (index, given) if later == [node] else None

    def set_points(self, points: Mapping[str, tuple[int, fx.Node, bool]]) -> None:
        """Remember where sites are changed that no module gives: cut, node, and whether its last axes are exchanged."""
        self._points = {name: point for name, point in points.items() if point[0] in self._caches}

    def point_of(self, site: str) -> tuple[int, fx.Node, bool] | None:
        """Where this site is changed; None if that is not known."""
        return self._points.get(site)

    def uses(self, names: Iterable[str]) -> list[int]:
        """The cuts right before the first uses of these tensors, ascending."""
        return sorted({self._first_use[name] for name in names if name in self._first_use})

    def last_node(self, cut: int) -> fx.Node:
        """The node right before this cut."""
        return self._nodes[cut - 1]

    def calls_before(self, cut: int, layers: Iterable[str]) -> dict[str, int]:
        """How often each of these modules is called before this cut."""
        called = [str(node.target) for node in self._nodes[:cut] if node.op == "call_module"]
        return {layer: called.count(layer) for layer in layers}

    def modules(self) -> dict[str, nn.Module]:
        """The modules of the graph by the names under which its nodes call them."""
        return dict(self._traced.named_modules())

    def place(self, cut: int, node: fx.Node | None = None) -> int:
        """Where among the live values at this cut the output of a node is, by default of the one right before it."""
        return self._live(cut).index(self._nodes[cut - 1] if node is None else node)

    def position_of(self, names: Sequence[str]) -> float:
        """How far into the graph the first use lies, 0 to 1: what a cut there would save, roughly."""
        return min((self._first_use.get(name, 0) for name in names), default=0) / max(len(self._nodes), 1)

    def prepare(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        sizes: Sequence[int],
        output: Output,
        budget: int,
        worth: Mapping[int, float] | None = None,
    ) -> None:
        """Record activations at as many cuts as `budget` bytes allow, and keep only cuts that prove faithful.

        Cuts are those before the first use of a parameter, evenly; or those of `worth`, the most worth a byte first.
        """
        self._prepared = (inputs, sizes, output, budget, worth)
        try:
            self._prepare(model, inputs, sizes, output, budget, worth)
        except Exception:  # what was traced cannot run like the model, in whatever way that shows: run the model
            self._caches, self._graphs, self._cuts, self._by_channels = {}, {}, [], {}
            self._windows, self._images = {}, []

    def _prepare(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        sizes: Sequence[int],
        output: Output,
        budget: int,
        worth: Mapping[int, float] | None,
    ) -> None:
        cuts = sorted(worth if worth is not None else {index for index in self._first_use.values() if index > 0})
        measured = self._visit(inputs[0], cuts, bytes_of)
        cost = {cut: size * sum(sizes) / sizes[0] for cut, size in measured.items()}
        usable = [cut for cut in cuts if cut in cost and cost[cut] <= budget]
        chosen = _evenly(usable, cost, budget) if worth is None else _by_worth(usable, cost, budget, worth)
        if not chosen:
            return
        self._golden = [copied(call(model, batch)) for batch in inputs]
        whole = {i: pick(golden, output).clone() for i, golden in enumerate(self._golden)}
        self._caches = {cut: [] for cut in chosen}
        for batch in inputs:
            recorded = self.record(batch, chosen)
            for cut in list(self._caches):
                if cut in recorded:
                    self._caches[cut].append(recorded[cut])
                else:
                    del self._caches[cut]
        later: int | None = None  # what runs from here gives the golden outputs
        for cut in sorted(self._caches, reverse=True):
            self._graphs[cut] = self._part(cut)
            if (later is not None and self._leads_to(cut, later, whole)) or all(
                same(expected, pick(self.resume(cut, i), output)) for i, expected in whole.items()
            ):
                later = cut
            else:
                del self._caches[cut], self._graphs[cut]
        self._cuts = sorted(self._caches)
        if worth is None:
            self._by_channels = {cut: layer for cut in self._cuts if (layer := self._computed_by_channels(cut))}
        else:
            self._prepare_windows(inputs, sizes, output, whole, budget - sum(cost[cut] for cut in self._cuts))

    def _prepare_windows(
        self, inputs: Sequence[Any], sizes: Sequence[int], output: Output, whole: Mapping[int, Tensor], budget: float
    ) -> None:
        """Find where windows can be computed, and keep the golden images that they are part of, if there is room."""
        modules = self.modules()
        images = self._golden_images(inputs[0])
        sides = {node: image.shape[-1] for node, image in images.items()}
        found: dict[int, Windows] = {}
        ends: dict[int, bool] = {}
        for cut in self._cuts:
            ways = Windows.behind(cut, self._nodes, self._live, sides, modules, _is_watched)
            way = next((way for way in ways if self._is_faithful(way, images, ends, whole[0], output)), None)
            if way is not None:
                found[cut] = way
        needed = {node for way in found.values() for node in way.needed}
        if sum(images[node].nbytes for node in needed) * sum(sizes) / sizes[0] > budget:
            return
        kept = [{node: images[node] for node in needed}]
        for i, batch in enumerate(inputs[1:], start=1):
            images, ends = self._golden_images(batch), {}
            found = {cut: way for cut, way in found.items() if self._is_faithful(way, images, ends, whole[i], output)}
            kept.append({node: images[node] for node in needed if node in images})
        self._windows, self._images = found, kept

    def _is_faithful(
        self, way: Windows, images: Mapping[fx.Node, Tensor], ends: dict[int, bool], whole: Tensor, output: Output
    ) -> bool:
        """Whether windows are what golden images hold, and the golden outputs follow from what they are put into.

        `ends` remembers for which ends they do.
        """
        if not {way.first, *way.nodes} <= images.keys() or not way.faithful(images, images[way.first]):
            return False
        if way.end not in ends:
            ends[way.end] = same(whole, pick(self.graph(way.end).forward(images[way.last].clone()), output))
        return ends[way.end]

    def _golden_images(self, inputs: Any) -> dict[fx.Node, Tensor]:
        """What nodes give that are square images in float32, channels first, as they give it."""
        recorder = _Images(self._traced)
        recorder.run(*_arguments(self._model, own(inputs)).values())
        return recorder.found

    def _computed_by_channels(self, cut: int) -> nn.Conv2d | None:
        """The convolution right behind a cut if its channels can be computed block by block; None if not.

        Every block has to be what the whole layer gives, bit by bit, on every batch; and so it has to be where a weight
        is hit. How the sums are taken depends on shapes, not on values.
        """
        node = self._nodes[cut]
        layer = self.modules().get(str(node.target)) if node.op == "call_module" else None
        if type(layer) is not nn.Conv2d or layer.groups != 1 or cut + 1 not in self._caches:
            return None
        watched = layer._forward_hooks or layer._forward_pre_hooks
        weight = layer.weight
        plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
        if watched or not plain or len(weight) <= _BLOCK or node.kwargs or node.args != tuple(node.all_input_nodes):
            return None
        place, blocks = self.place(cut + 1), range(0, len(weight), _BLOCK)
        for batch, live in enumerate(self._caches[cut]):
            x = live[self._live(cut).index(node.all_input_nodes[0])]
            golden = self._caches[cut + 1][batch][place]
            if not all(same(_channels(layer, x, weight, b), golden[:, b : b + _BLOCK]) for b in blocks):
                return None
            hit, patched = weight.detach().clone(), golden.clone()
            for filter, scale in ((0, -1.0), (len(weight) // 2, 2.0**64), (len(weight) - 1, 0.0)):
                hit[filter].view(-1)[filter % hit[filter].numel()] *= scale
                b = filter // _BLOCK * _BLOCK
                patched[:, b : b + _BLOCK] = _channels(layer, x, hit, b)
            if not same(patched, layer._conv_forward(x, hit, layer.bias)):
                return None
        return layer

    def _leads_to(self, cut: int, later: int, batches: Iterable[int]) -> bool:
        """Whether golden values at a cut give the golden values at a later one, bit by bit."""
        step = self.step(cut, later)
        return all(same(step(*copied(self._caches[cut][i])), self._caches[later][i]) for i in batches)

    def resume(self, cut: int, batch: int, looks: Sequence[int] = (), rows: tuple[int, int] | None = None) -> Any:
        """What the model returns on a batch, computed from `cut` on, or up to one of `looks` if all is golden there.

        Args:
            cut: a prepared one.
            batch: which one.
            looks: prepared cuts behind it, ascending.
            rows: all that differs from the fault-free model are slices from the first to the last of these of axis 0 of
                one tensor, which nothing reads behind the first look.
        """
        live = self._block(cut, batch, looks, rows)
        ahead = looks if live is None else looks[1:]
        if live is None:
            live = copied(self._caches[cut][batch])
        else:
            cut = looks[0]
            if same(live, self._caches[cut][batch]):
                return copied(self._golden[batch])
        for look in ahead:
            live = self.step(cut, look).forward(*live)
            if same(live, self._caches[look][batch]):
                return copied(self._golden[batch])
            cut = look
        return self._graphs[cut].forward(*live)  # called as a module, it prints what a faulty forward raises

    def _block(self, cut: int, batch: int, looks: Sequence[int], rows: tuple[int, int] | None) -> list[Any] | None:
        """What is live right behind a convolution of which these filters are hit; None if that takes all of it.

        The first look, right behind it, says that nothing else reads what is hit: it is the layer's weight or its bias.
        """
        layer = self._by_channels.get(cut) if rows is not None and looks and looks[0] == cut + 1 else None
        if layer is None or rows is None or rows[0] // _BLOCK != rows[1] // _BLOCK:
            return None
        first = rows[0] // _BLOCK * _BLOCK
        x = self._caches[cut][batch][self._live(cut).index(self._nodes[cut].all_input_nodes[0])]
        live: list[Any] = copied(self._caches[cut + 1][batch])
        live[self.place(cut + 1)][:, first : first + _BLOCK] = _channels(layer, x, layer.weight, first)
        return live

    def resume_changed(
        self,
        cut: int,
        batch: int,
        change: Callable[[Any], Any],
        plain: bool = False,
        node: fx.Node | None = None,
    ) -> Any:
        """What the model returns on a batch if the output of a node, by default the one right before a cut, is changed.

        `plain` says that the layers behind it give what they compute: no format stores it, nothing else changes it.
        """
        place = self.place(cut, node)
        if plain and cut in self._windows:
            way, golden = self._windows[cut], self._caches[cut][batch][place]
            start = changed_window(change(golden), golden)
            window = None if start is None else way.run(start, self._images[batch])
            if window is not None:
                return self.graph(way.end).forward(put(window, self._images[batch][way.last]))
        live = copied(self._caches[cut][batch])
        live[place] = change(live[place])
        return self._graphs[cut].forward(*live)  # called as a module, it prints what a faulty forward raises

    def cached(self, cut: int) -> bool:
        """Whether golden values are kept at this cut."""
        return cut in self._caches

    def cache(self, cut: int, batch: int) -> list[Any]:
        """Golden values that are live at a prepared cut; not to be changed."""
        return self._caches[cut][batch]

    def golden(self, batch: int) -> Any:
        """What the fault-free model returned; not to be changed."""
        return self._golden[batch]

    def graph(self, cut: int) -> fx.GraphModule:
        """From what is live at a cut to what the model returns."""
        if cut not in self._graphs:
            self._graphs[cut] = self._part(cut)
        return self._graphs[cut]

    def step(self, cut: int, end: int) -> fx.GraphModule:
        """From what is live at a cut to what is live at a later one."""
        if (cut, end) not in self._steps:
            self._steps[cut, end] = self._part(cut, end)
        return self._steps[cut, end]

    def _live(self, cut: int) -> list[fx.Node]:
        later = self._nodes[cut:]
        needed = {source for node in later for source in node.all_input_nodes}
        return [node for node in self._nodes[:cut] if node in needed]

    def _part(self, cut: int, end: int | None = None) -> fx.GraphModule:
        """From what is live at `cut` to what the model returns, or to what is live at `end`."""
        graph = fx.Graph()
        placed: dict[fx.Node, fx.Node] = {
            node: graph.placeholder(f"live_{i}") for i, node in enumerate(self._live(cut))
        }
        for node in self._nodes[cut:end]:
            placed[node] = graph.node_copy(node, lambda source: placed[source])
        if end is not None:
            graph.output([placed[node] for node in self._live(end)])
        return fx.GraphModule(self._traced, graph)

    def record(self, inputs: Any, cuts: Sequence[int]) -> dict[int, list[Any]]:
        """Copies of what is live at each cut, taken at that moment: later nodes may work in place."""
        copies: Copies = {}

        def copy(live: list[Any]) -> list[Any]:
            taken = [copied(value, copies) for value in live]
            here = {id(leaf) for leaf in pytree.tree_leaves(live)}
            for gone in copies.keys() - here:  # no later node reads them
                del copies[gone]
            return taken

        return self._visit(inputs, cuts, copy)

    def _visit(self, inputs: Any, cuts: Sequence[int], take: Callable[[list[Any]], T]) -> dict[int, T]:
        """Run the model node by node and take something of what is live at each cut.

        Cuts where two live values share memory, or where one is neither a tensor nor a plain value, are left out.
        """
        interpreter = fx.Interpreter(self._traced)
        arguments = iter(_arguments(self._model, own(inputs)).values())
        env: dict[fx.Node, Any] = {}
        wanted = set(cuts)
        taken: dict[int, T] = {}
        for index, node in enumerate(self._nodes):
            if index in wanted:
                live = [env[source] for source in self._live(index)]
                if separate(live):
                    taken[index] = take(live)
                del live
            if node.op == "placeholder":
                env[node] = next(arguments)
            elif node.op != "output":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: env[source])
                env[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
                del args, kwargs
            for dead in interpreter.user_to_last_uses.get(node, ()):
                del env[dead]
        return taken


def _traced_again(
    kind: type[Suffixes], model: nn.Module, inputs: Sequence[Any], prepared: tuple[Any, ...] | None
) -> Suffixes | None:
    """The same of a copy of the model that arrived in another process."""
    with eval_mode(model), one_thread(device_of(model)):
        found = kind.trace(model, inputs)
        if found is not None and prepared is not None:
            found.prepare(model, *prepared)
    return found


class _Images(fx.Interpreter):
    """Copies of all square images, each taken when it is computed: later nodes may work in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        plain = type(value) is Tensor and value.dtype == torch.float32 and value.device.type == "cpu"
        if plain and value.dim() == 4 and value.shape[2] == value.shape[3] > 1 and value.is_contiguous():
            self.found[n] = value.clone()
        return value


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what a module computes, other than that of a space of neurons."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not _module_of(hook).startswith("flipproof._hooks.") for hook in hooks)


def _channels(layer: nn.Conv2d, x: Tensor, weight: Tensor, first: int) -> Tensor:
    """A block of the channels that a convolution gives."""
    bias = None if layer.bias is None else layer.bias[first : first + _BLOCK]
    found: Tensor = layer._conv_forward(x, weight[first : first + _BLOCK], bias)
    return found


def _evenly(usable: list[int], cost: Mapping[int, float], budget: int) -> list[int]:
    strides = (usable[stride - 1 :: stride] for stride in range(1, len(usable) + 1))
    return next((chosen for chosen in strides if sum(cost[cut] for cut in chosen) <= budget), [])


def _by_worth(usable: list[int], cost: Mapping[int, float], budget: int, worth: Mapping[int, float]) -> list[int]:
    chosen: list[int] = []
    for cut in sorted(usable, key=lambda cut: worth[cut] / max(cost[cut], 1), reverse=True):
        if sum(cost[c] for c in chosen) + cost[cut] <= budget:
            chosen.append(cut)
    return sorted(chosen)


def _is_opaque(module: nn.Module, traced_through: bool) -> bool:
    """Whether a call of this module does something that a trace of its forward would lose."""
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    users = [hook for hook in hooks if not _module_of(hook).startswith(("torch.", "flipproof."))]
    if traced_through:  # tracing runs through it without calling it
        return any(not _module_of(hook).startswith("flipproof.spaces.steps.") for hook in hooks)
    return any(refers_to_tensors(hook) for hook in users)


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__) + "."


def sharing_memory(model: nn.Module, names: Iterable[str]) -> list[set[str]]:
    """Groups of names whose tensors overlap in memory: a fault in one is a fault in all."""
    spans = []
    for name in names:
        tensor = attrgetter(name)(model)
        for _, part in parts(name, tensor) if isinstance(tensor, Tensor) else ():
            if part.layout == torch.strided and part.numel():
                reach = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
                start = part.data_ptr()
                spans.append((str(part.device), start, start + reach * part.element_size(), name))
    groups: list[set[str]] = []
    place, end = "", 0
    for device, start, stop, name in sorted(spans):
        if device == place and start < end:
            groups[-1].add(name)
            end = max(end, stop)
        else:
            groups.append({name})
            place, end = device, stop
    return [group for group in groups if len(group) > 1]


def _arguments(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs by the names of the forward's parameters, in their order, defaults filled in."""
    signature = inspect.signature(model.forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise TypeError("a forward with *args or **kwargs is not traced argument by argument")
    if isinstance(inputs, Mapping):
        bound = signature.bind(**inputs)
    elif isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        bound = signature.bind(*inputs)
    else:
        bound = signature.bind(inputs)
    bound.apply_defaults()
    return bound.arguments


def _fixed(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Any]:
    """Arguments that are plain values, the same in every batch: `if mask is None` has to go the way it really goes."""
    every = [
        {name: value for name, value in _arguments(model, batch).items() if isinstance(value, PLAIN)}
        for batch in inputs
    ]
    if any(fixed != every[0] for fixed in every):
        raise TypeError("arguments that are not tensors differ between batches")
    return every[0]
