"""Whether every step of a traced network gives, for each sample, what that sample alone makes of it.

That rows of a batch do not depend on each other cannot be seen from what they answer: an early exit may look at all of
them and only ever take its other way under faults. So each step is looked at by its kind, and by the shapes it has on
the first batch. A kind that is not known here is not row-wise.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flipproof.spaces.quantised import is_wrapper

_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.PReLU, nn.Identity),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
        *(nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.ZeroPad2d, nn.Upsample),
    }
)
"""Modules that work on each sample alone."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_ALONE = frozenset(
    {
        *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid),
        *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.softplus, torch.abs, torch.neg),
        *(torch.exp, torch.sqrt, torch.rsqrt, torch.clamp, torch.erf, operator.neg),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate),
    }
)
"""Functions of one sample each, whose first argument alone depends on samples."""
_TOGETHER = frozenset(
    {
        *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, operator.pow, torch.pow),
    }
)
"""Functions that are taken value by value."""
_PRODUCTS = (torch.matmul, operator.matmul, torch.bmm, F.scaled_dot_product_attention)
_METHODS = frozenset(
    {
        *("relu", "relu_", "sigmoid", "tanh", "clamp", "clamp_", "abs", "neg", "exp", "sqrt", "rsqrt", "contiguous"),
        *("clone", "detach", "float", "double", "half", "bfloat16", "to", "type_as", "square", "pow"),
    }
)
_SHAPES = ("size", "dim", "numel", "ndimension")
_FOLDED = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_REDUCED = ("mean", "sum", "amax", "amin", "softmax", "log_softmax", "norm", "logsumexp", "var", "std")


class _Values(fx.Interpreter):
    """What each step gives on one batch: the shape of a tensor, anything else as it is."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.shapes[n] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


def row_wise(traced: fx.GraphModule, arguments: list[Any], size: int) -> frozenset[fx.Node]:
    """The steps of a network that depend on samples and give each sample what it alone makes of it.

    A step counts as row-wise only by itself: what it is given may be another matter.

    Args:
        traced: the network, in eval mode.
        arguments: one batch, as its placeholders take it.
        size: samples of it.
    """
    values = _Values(traced)
    with torch.no_grad():
        values.run(*arguments)
    modules = dict(traced.named_modules())
    depends: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
            if node.op in ("placeholder", "output") or _is_row_wise(node, values.shapes, depends, modules, size):
                found.add(node)
        else:
            found.add(node)  # parameters, and what is made of them: the same for all samples
    return frozenset(found)


def _is_row_wise(
    node: fx.Node,
    shapes: Mapping[fx.Node, tuple[int, ...] | None],
    depends: set[fx.Node],
    modules: Mapping[str, nn.Module],
    size: int,
) -> bool:
    sources = [source for source in node.all_input_nodes if source in depends]
    tensors = [source for source in sources if shapes[source] is not None]
    if node.op == "call_method" and node.target in _SHAPES:
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"):
        return True
    if not tensors:  # numbers made of shapes
        return shapes[node] is None
    shape, first = shapes[node], shapes[tensors[0]]
    assert first is not None
    if shape is None or not shape or shape[0] != size or any((shapes[t] or (0,))[0] != size for t in tensors):
        return False
    others = [s for s in node.all_input_nodes if s not in depends and shapes[s] is not None]
    if node.op == "call_module":
        return len(sources) == 1 and len(first) > 1 and _module_is(modules[str(node.target)], len(first))
    if not all(len(shapes[s] or ()) < len(shape) or (shapes[s] or (0,))[0] == 1 for s in others) and (
        node.target in _ALONE or node.target in _TOGETHER
    ):
        return False  # a parameter that has an entry for each place in the batch
    if node.op == "call_method":
        name = str(node.target)
        if name in _METHODS:
            return len(tensors) == 1
        if name in _FOLDED:
            return True  # the rows of a batch that stays as long are the same values, in the same order
        if name in ("transpose", "permute"):
            return _rows_stay_first(node, len(first))
        return name in _REDUCED and _dims_are_others(node, 1, len(first))
    if node.op != "call_function":
        return False
    if node.target in _ALONE:
        return tensors == sources[:1] and node.args[0] is tensors[0]
    if node.target in _TOGETHER:  # all of one rank, or broadcasting could lay samples over another axis
        return all(len(shapes[t] or ()) == len(shape) for t in tensors)
    if node.target in _PRODUCTS:
        known = set(tensors) >= set(node.all_input_nodes)
        return known and len(shape) > 2 and all(len(shapes[t] or ()) == len(shape) for t in tensors)
    if node.target is F.linear:
        return sources == [node.args[0]] and len(first) > 1
    if node.target is F.pad:
        pads: Any = node.args[1]
        return isinstance(pads, (tuple, list)) and len(pads) // 2 < len(first) and len(tensors) == 1
    if node.target in (torch.transpose, torch.permute):
        return _rows_stay_first(node, len(first))
    if node.target is operator.getitem:
        return _keeps_rows(node.args[1])
    if node.target in (torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze):
        return True
    if node.target in (torch.cat, torch.concat):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return isinstance(dim, int) and dim % len(shape) != 0
    if node.target in (torch.mean, torch.sum, torch.amax, torch.amin, F.softmax, F.log_softmax, torch.softmax):
        return _dims_are_others(node, 1, len(first))
    return node.target is F.dropout and not (node.kwargs.get("training", True) or len(node.args) > 2)


def _module_is(module: nn.Module, rank: int) -> bool:
    kind = type(module)
    if any(is_wrapper(parameter) for parameter in module.parameters()):
        return False  # a library's tensors may quantise what they are given by a scale of the whole batch
    if isinstance(module, nn.modules.conv._ConvNd) and rank != module.weight.dim():
        return False  # one image without a batch
    if kind is nn.LayerNorm:
        return len(getattr(module, "normalized_shape", ())) < rank
    if kind in _NORMS:
        norm: Any = module
        return not norm.training and norm.running_mean is not None
    if kind in _DROPOUTS:
        return not module.training
    if kind in (nn.Softmax, nn.LogSoftmax):
        dim = getattr(module, "dim", None)
        return isinstance(dim, int) and dim > 0
    if kind is nn.Flatten:
        return getattr(module, "start_dim", 0) >= 1
    return kind in _MODULES


def _dims_are_others(node: fx.Node, place: int, rank: int) -> bool:
    """Whether a step goes over named axes, none of which counts samples."""
    dims = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
    several = dims if isinstance(dims, (tuple, list)) else [dims]
    return all(isinstance(dim, int) and dim % rank != 0 for dim in several)


def _rows_stay_first(node: fx.Node, rank: int) -> bool:
    """Whether axes change places, and the first one does not."""
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    axes = [axis % rank for axis in given if isinstance(axis, int)]
    if len(axes) != len(given) or not axes:  # by keyword, or made while it runs
        return False
    permuted = str(node.target) == "permute" or node.target is torch.permute
    return axes[0] == 0 if permuted else 0 not in axes


def _keeps_rows(index: Any) -> bool:
    """Whether an index takes all samples, in order, and is no tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, (int, slice)) or part is None or part is Ellipsis for part in parts)
    return plain and bool(parts) and parts[0] == slice(None)
