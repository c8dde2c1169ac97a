"""How many multiplications a forward takes, and which module makes each: what a probe costs, what a map speaks of.

One forward runs under a dispatch mode that sees every operator, whoever calls it: a module, a function of
`torch.nn.functional`, attention. An operator belongs to the innermost module that runs at that moment, and to the
parameter that it reads. Fused kernels (LSTM, GRU, attention) are switched off meanwhile, so that they show their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flipproof.running.data import call
from flipproof.running.evaluation import eval_mode
from flipproof.spaces.sites import NeuronSite


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution of a forward.

    Attributes:
        modules: the modules that ran at that moment, outermost first, each with the number of its call; the model
            itself has the name "".
        parameter: the parameter or buffer that it multiplies by, or None for activations by activations.
        operator: what torch calls it.
        count: multiply-accumulates.
    """

    modules: tuple[tuple[str, int], ...]
    parameter: str | None
    operator: str
    count: int


class Multiplications:
    """The matrix products and convolutions of one forward, in the order of execution.

    A product of (n, k) and (k, m) counts n·k·m; a convolution (number of outputs) × (input channels / groups) × (size
    of the kernel), also where it meets padding; a transposed one (number of inputs) × (output channels / groups) ×
    (size of the kernel). Sums, scales, normalisation, activations and look-ups count nothing.

    Args:
        products: what was seen.
        ended: for every call of a module, how many products had been made when it returned.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = Multiplications.of(net, torch.zeros(5, 4))
        >>> found.total, found.behind("0"), found.behind("2")  # 5·4·8 + 5·8·2
        (240, 80, 0)
    """

    def __init__(self, products: Sequence[Product], ended: Mapping[tuple[str, int], int]) -> None:
        self.products, self._ended = tuple(products), dict(ended)
        self.total = sum(product.count for product in products)
        """Multiply-accumulates of the whole forward."""

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> Multiplications:
        """Run the model once and count. The model comes back as it was."""
        seen = _Watch(model)
        with eval_mode(model), _unfused(), seen.hooked(), seen:
            call(model, inputs)
        return cls(seen.products, seen.ended)

    def behind(self, layer: str, number: int = 0) -> int:
        """Multiply-accumulates made after this call of a layer returned; all of them if it was never called."""
        first = self._ended.get((layer, number))
        return self.total if first is None else sum(product.count for product in self.products[first:])

    def coverage(self, sites: Sequence[NeuronSite]) -> tuple[float, dict[str, str]]:
        """How much of a forward the outputs of some layers speak of.

        Returns:
            The share of multiply-accumulates made while a call of these layers ran (1.0 if there are none at all), and
            by name what made the rest, with the reason.
        """
        within = {(site.layer, site.call) for site in sites}
        spoken = sum(product.count for product in self.products if within & set(product.modules))
        rest: dict[str, str] = {}
        for product in self.products:
            if not within & set(product.modules):
                name, why = _left_out(product)
                rest.setdefault(name, why)
        return (spoken / self.total if self.total else 1.0), rest


def _left_out(product: Product) -> tuple[str, str]:
    """A name for what made a product that no layer's output shows, and why it is none."""
    module = product.modules[-1][0] if product.modules else ""
    shown = repr(module) if module else "the model's own forward"
    if product.operator in _QUANTISED and product.parameter is None:
        return module or "forward", f"its weight is quantised and packed ({product.operator}), no torch.nn layer has it"
    if product.parameter is None:
        name = f"{module or 'forward'} (activations × activations)"
        return name, f"{shown} multiplies activations by activations ({product.operator}): no layer gives that product"
    owner, _, attribute = product.parameter.rpartition(".")
    if owner == module and module:
        return module, f"it multiplies by its {attribute} ({product.operator}), but is no Conv, Linear, LSTM or GRU"
    why = f"{shown} multiplies by it in a function ({product.operator}), not by calling a layer"
    return (owner if owner and attribute in ("weight", "_packed_params") else product.parameter), why


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs while it is active, and knows which modules are running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []
        self.ended: dict[tuple[str, int], int] = {}
        self._model = model
        self._running: list[tuple[str, int]] = []
        self._calls: dict[str, int] = {}
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._memory = sorted((t.data_ptr(), t.numel() * t.element_size(), name) for name, t in tensors if t.numel())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        rule = _RULES.get(func.overloadpacket.__name__)
        if rule is not None:
            name = func.overloadpacket.__name__
            factors = args[1:] if name in _ADDS else args  # what is added to a product is no factor
            tensors = [leaf for leaf in pytree.tree_leaves(factors) if isinstance(leaf, Tensor)]
            read = next((found for found in map(self._name, tensors) if found is not None), None)
            self.products.append(Product(tuple(self._running), read, name, rule(args, result)))
        return result

    def _name(self, tensor: Tensor) -> str | None:
        """The parameter or buffer in whose memory a tensor lies."""
        try:
            place = tensor.data_ptr()
        except RuntimeError:  # a tensor without memory of its own
            return None
        return next((name for first, size, name in self._memory if first <= place < first + size), None)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule) and name:
                    continue  # runs without Python: its products belong to the module around it
                before = module.register_forward_pre_hook(self._enter(name), prepend=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            number = self._calls.get(name, 0)
            self._calls[name] = number + 1
            self._running.append((name, number))

        return hook

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.ended[self._running.pop()] = len(self.products)


@contextmanager
def _unfused() -> Iterator[None]:
    """Kernels that do several products at once are off, so that each product shows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _matrix(left: int) -> Callable[[Any, Any], int]:
    """Outputs × length of the sums, read off the left factor, which is this argument."""
    return lambda args, result: int(result.numel()) * int(args[left].shape[-1])


def _convolution(args: Any, result: Any) -> int:
    transposed = len(args) > 6 and bool(args[6])
    pixels: int = (args[0] if transposed else result).numel()
    return pixels * int(args[1][0].numel())


def _packed(args: Any, result: Any) -> int:
    """A quantised layer: its weight is inside an object that unpacks it."""
    weight = args[1] if isinstance(args[1], Tensor) else args[1].unpack()[0]
    outputs: int = result.numel()
    return outputs * int(weight[0].numel())


def _recurrent(args: Any, result: Any) -> int:
    """One layer and direction of an LSTM: every step of every sample goes through both matrices."""
    steps, from_input, from_state = args[:3]
    each: int = from_input.numel() + from_state.numel()
    return int(prod(steps.shape[:-1])) * each


def _attention(args: Any, result: Any) -> int:
    query, key, value = args[:3]
    return int(prod(query.shape[:-1])) * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])


_ADDS = ("addmm", "addmv", "addbmm", "baddbmm", "addr", "_addmm_activation")

_QUANTISED = (
    *("linear", "linear_relu", "linear_dynamic", "linear_relu_dynamic", "conv1d", "conv2d", "conv3d"),
    *("conv1d_relu", "conv2d_relu", "conv3d_relu", "conv2d_dynamic"),
)

_RULES: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_grouped_mm"), _matrix(0)),
    **dict.fromkeys(("_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu"), _matrix(0)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "_addmm_activation"), _matrix(1)),
    "addbmm": lambda args, result: prod(args[1].shape) * int(result.shape[-1]),
    "mkldnn_rnn_layer": _recurrent,
    "ger": lambda args, result: int(result.numel()),
    "addr": lambda args, result: int(result.numel()),
    "_trilinear": lambda args, result: prod(max(lengths) for lengths in zip(*_widened(args), strict=True)),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(_QUANTISED, _packed),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
}
"""By the operator's name: multiply-accumulates, from its arguments and its result."""


def _widened(args: Any) -> list[tuple[int, ...]]:
    """Shapes of the three factors of `_trilinear` with the dimensions put in that each is spread over."""
    shapes = []
    for factor, spread in zip(args[:3], args[3:6], strict=True):
        shape = list(factor.shape)
        for dim in spread:
            shape.insert(dim, 1)
        shapes.append(tuple(shape))
    return shapes
