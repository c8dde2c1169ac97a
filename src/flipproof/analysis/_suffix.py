"""The suffix of a layer: what runs behind it on golden activations of chosen samples, and what hides errors there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flipproof._interrupts import check
from flipproof.running.resume import Suffixes
from flipproof.running.values import rows_of
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.sites import NeuronSite

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)

InPlaceChange = Callable[[Tensor], None]
"""Changes a layer's output in place; its rows are those that are asked about."""


def cut_behind(suffixes: Suffixes, site: NeuronSite, calls: int) -> int | None:
    """The cut right behind this call of a layer; None if the trace does not hold its `calls` calls, or nothing reads
    what this one gives.
    """
    return suffixes.behind(site.layer, site.call, calls)


class Suffix:
    """What runs behind one call of a layer, and the golden activations of a batch there.

    Raises:
        LookupError: if there is no cut behind it.
    """

    def __init__(self, suffixes: Suffixes, space: NeuronSpace, site: NeuronSite, batch: int, inputs: Any, size: int):
        cut = cut_behind(suffixes, site, space.calls[site.layer])
        if cut is None:
            raise LookupError(f"there is no cut behind {site.name}")
        self._space, self._batch = space, batch
        self._node = suffixes.last_node(cut)
        self._made = suffixes.calls_before(cut, space.calls)
        space.begin(batch)
        self._live = suffixes.record(inputs, [cut])[cut]
        self._size = size
        self._place = suffixes.place(cut)
        self._graph = suffixes.graph(cut)
        self.last = all(node.op in ("placeholder", "output") for node in self._graph.graph.nodes)
        self.shape = self._live[self._place].shape
        """Of the layer's output."""
        self.values: Tensor = self._live[self._place].reshape(size, -1)
        self._modules = suffixes.modules()

    def run(self, rows: Tensor, change: InPlaceChange | None = None) -> Any:
        """What the model returns for these rows, with the layer's output changed."""
        check()
        live = rows_of(self._live, rows, self._size)
        if change is not None:
            change(live[self._place])
        self._space.begin(self._batch, self._made)
        return self._graph.forward(*live)  # called as a module, it would print what it raises

    @property
    def live(self) -> list[Any]:
        """The golden values behind the layer that what follows reads."""
        return self._live

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
