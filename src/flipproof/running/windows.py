"""The window that an upset changes: a few pixels wide at first, and wider by a kernel at every convolution.

Behind one changed value of an image, everything outside a window is golden. So the layers that follow are computed on
that window alone, a window of its own for each sample, until it is about as large as the image; then it is put into
the golden values, and the rest of the network runs as ever. Whether a library sums a cropped image in the same order as
the whole one is its own affair: `Windows.faithful` asks it, layer by layer and size by size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flipproof._kernels import kernel
from flipproof.running.values import same
from flipproof.spaces.quantised import is_wrapper

_LARGEST = 0.7
"""Share of an image's side up to which computing a window takes less time than computing all of it."""

_ALIKE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.Identity, nn.Dropout, nn.BatchNorm2d)
_FUNCTIONS = (F.relu, torch.relu)
_SUMS = (operator.add, torch.add)


@dataclass
class Window:
    """What an image holds in one square a sample.

    Attributes:
        values: (N, C, k, k).
        top: the first row of each sample's square, (N,).
        left: its first column.
    """

    values: Tensor
    top: Tensor
    left: Tensor

    @property
    def side(self) -> int:
        """Its rows, and columns."""
        return self.values.shape[-1]


@dataclass(frozen=True)
class Windows:
    """How to get from the output right before a cut to what is live at a later one.

    Attributes:
        first: the node whose output is changed.
        nodes: what is computed on windows, in order.
        end: the later cut.
        last: the one node that is live there.
        sides: of the images that nodes give, golden ones included.
        needed: nodes whose golden values are read, besides the first.
        modules: of the graph.
    """

    first: fx.Node
    nodes: tuple[fx.Node, ...]
    end: int
    last: fx.Node
    sides: Mapping[fx.Node, int]
    needed: frozenset[fx.Node]
    modules: Mapping[str, nn.Module]

    @classmethod
    def behind(
        cls,
        cut: int,
        nodes: list[fx.Node],
        live: Callable[[int], list[fx.Node]],
        sides: Mapping[fx.Node, int],
        modules: Mapping[str, nn.Module],
        watched: Callable[[nn.Module], bool],
    ) -> list[Windows]:
        """The ways from a cut on, the longest first.

        Args:
            cut: behind the node that is changed.
            nodes: of the graph.
            live: the nodes that are read behind a cut.
            sides: of the square images that nodes give.
            modules: of the graph.
            watched: whether somebody sees what a module computes.
        """
        first = nodes[cut - 1]
        if first not in sides:
            return []
        changed: dict[fx.Node, int] = {first: 1}
        computed: list[fx.Node] = []
        needed: set[fx.Node] = set()
        ways: list[Windows] = []
        for index, node in enumerate(nodes[cut:], start=cut):
            if any(source in changed for source in node.all_input_nodes):
                side = _side(node, changed, sides, modules, watched)
                if side is None or side > _LARGEST * sides[node]:
                    break
                changed[node] = side
                computed.append(node)
                if _is_conv(node, modules) or len(node.all_input_nodes) > 1:
                    needed |= set(node.all_input_nodes)
            worth = any(_is_conv(passed, modules) for passed in computed)
            if worth and live(index + 1) == [computed[-1]] == [node]:  # nothing else is read from there on
                read = frozenset(needed | {node}) - {first}
                ways.append(cls(first, tuple(computed), index + 1, node, sides, read, modules))
        return ways[::-1]

    def run(self, start: Window, golden: Mapping[fx.Node, Tensor], check: bool = False) -> Window | None:
        """The window at the end; None where two windows that are added do not lie within one.

        With `check`, None also where one on the way is not what the golden image holds there.
        """
        found = {self.first: start}
        for node in self.nodes:
            sources = node.all_input_nodes
            if _is_conv(node, self.modules):
                layer = self.modules[str(node.target)]
                assert isinstance(layer, nn.Conv2d)
                window = _convolved(layer, found[sources[0]], golden[sources[0]], self.sides[node])
            elif len(sources) == 2:
                sum_ = _added(*((found.get(source), golden[source]) for source in sources))
                if sum_ is None:
                    return None
                window = sum_
            else:
                window = found[sources[0]]
                alike = self.modules[str(node.target)] if node.op == "call_module" else torch.relu
                window = Window(alike(window.values), window.top, window.left)
            if check and not same(window.values, _taken(golden[node], window.top, window.left, window.side)):
                return None
            found[node] = window
        return found[self.last]

    def faithful(self, golden: Mapping[fx.Node, Tensor], first: Tensor) -> bool:
        """Whether windows of golden values are what the golden images hold there, bit by bit, wherever they lie."""
        generator = torch.Generator().manual_seed(0)
        rows, room = len(first), first.shape[-1]
        for corner in (True, False):
            top, left = (torch.randint(room, (rows,), generator=generator) for _ in range(2))
            if corner:
                top, left = top // (room // 2 + 1) * (room - 1), left // (room // 2 + 1) * (room - 1)
            if self.run(Window(_taken(first, top, left, 1), top, left), golden, check=True) is None:
                return False
        return True


def changed_window(faulty: Tensor, golden: Tensor) -> Window | None:
    """The pixel of each sample that differs; None if more than one does in some sample."""
    differs = (faulty.view(torch.int32) != golden.view(torch.int32)).any(dim=1).flatten(1)
    if int(differs.sum(dim=1).max()) > 1:
        return None
    place = differs.to(torch.uint8).argmax(dim=1)
    top, left = place // golden.shape[-1], place % golden.shape[-1]
    return Window(_taken(faulty, top, left, 1), top, left)


def put(window: Window, golden: Tensor) -> Tensor:
    """A golden image with windows in it."""
    whole = golden.clone()
    _put(window.values.numpy(), window.top.numpy(), window.left.numpy(), whole.numpy())
    return whole


def _is_conv(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) is nn.Conv2d


def _side(
    node: fx.Node,
    changed: Mapping[fx.Node, int],
    sides: Mapping[fx.Node, int],
    modules: Mapping[str, nn.Module],
    watched: Callable[[nn.Module], bool],
) -> int | None:
    """How wide a window of this node's output is; None for what is not computed on windows."""
    sources = node.all_input_nodes
    if node not in sides or node.args != tuple(sources) or any(source not in sides for source in sources):
        return None
    widest = max(changed[source] for source in sources if source in changed)
    if node.op == "call_module" and not node.kwargs and len(sources) == 1:
        layer = modules[str(node.target)]
        if watched(layer):
            return None
        if type(layer) is nn.Conv2d:
            size, stride, padding = layer.kernel_size, layer.stride, layer.padding
            odd = len({*size}) > 1 or len({*stride}) > 1 or isinstance(padding, str) or len({*padding}) > 1
            odd |= is_wrapper(layer.weight)  # what it makes of a window may depend on all of it
            if odd or layer.padding_mode != "zeros" or {*layer.dilation} != {1}:
                return None
            return min((widest + size[0] - 2) // stride[0] + 1, sides[node])
        plain = type(layer) in _ALIKE and not layer.training and not getattr(layer, "inplace", False)
        return widest if plain and getattr(layer, "track_running_stats", True) else None
    if node.op == "call_function" and len(sources) == 1 and node.target in _FUNCTIONS:
        return widest if node.kwargs in ({}, {"inplace": False}) else None
    if node.op == "call_function" and len(sources) == 2 and node.target in _SUMS and not node.kwargs:
        return widest
    return None


def _taken(image: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """A square of each sample, in one piece of memory, channels first."""
    return _around(Window(image[:, :, :0, :0], top, left), image, top, left, side)


def _around(window: Window, golden: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """A square elsewhere: what a window holds of it, golden values beside it, and 0 outside the image."""
    out = torch.empty(*golden.shape[:2], side, side)
    values = (window.values.contiguous().numpy(), window.top.numpy(), window.left.numpy())
    _cut_out(golden.numpy(), *values, top.numpy(), left.numpy(), out.numpy())
    return out


@kernel()
def _cut_out(image, values, at_row, at_column, top, left, out):  # type: ignore[no-untyped-def]
    samples, channels, side, _ = out.shape
    size, k = image.shape[2], values.shape[2]
    for n in range(samples):
        for c in range(channels):
            for i in range(side):
                row = top[n] + i
                outside = row < 0 or row >= size
                inner = row - at_row[n]
                for j in range(side):
                    column = left[n] + j
                    out[n, c, i, j] = 0 if outside or column < 0 or column >= size else image[n, c, row, column]
                if 0 <= inner < k:
                    shift = at_column[n] - left[n]
                    for j in range(max(0, -shift), min(k, side - shift)):
                        out[n, c, i, j + shift] = values[n, c, inner, j]


@kernel()
def _put(values, top, left, image):  # type: ignore[no-untyped-def]
    samples, channels, side, _ = values.shape
    for n in range(samples):
        for c in range(channels):
            for i in range(side):
                for j in range(side):
                    image[n, c, top[n] + i, left[n] + j] = values[n, c, i, j]


def _convolved(layer: nn.Conv2d, window: Window, golden: Tensor, side: int) -> Window:
    """A convolution of a window, given the golden image that it takes and the side of the one that it gives."""
    size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    k = min((window.side + size - 2) // stride + 1, side)

    def first(place: Tensor) -> Tensor:  # the first output that reads the window, where there is room for all
        return (-((size - 1 - padding - place) // stride)).clamp(0, side - k)

    top, left = first(window.top), first(window.left)
    taken = max((k - 1) * stride + size, k * stride)  # of a whole image, too, a last column may be read by nobody
    image = _around(window, golden, top * stride - padding, left * stride - padding, taken)
    return Window(F.conv2d(image, layer.weight, layer.bias, stride, 0, 1, layer.groups), top, left)


def _added(one: tuple[Window | None, Tensor], other: tuple[Window | None, Tensor]) -> Window | None:
    """The sum of two images, of which one or both have windows."""
    windows = [window for window, _ in (one, other) if window is not None]
    largest = max(windows, key=lambda window: window.side)
    side, top, left = largest.side, largest.top, largest.left
    for window in windows:  # each within the largest: of two ways from one place, one usually sees what the other does
        for outer, inner in ((top, window.top), (left, window.left)):
            if bool(((inner < outer) | (inner + window.side > outer + side)).any()):
                return None
    parts = [
        _taken(golden, top, left, side) if window is None else _around(window, golden, top, left, side)
        for window, golden in (one, other)
    ]
    return Window(parts[0] + parts[1], top, left)
