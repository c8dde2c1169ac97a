"""Values that a forward computes in functions and no module gives: what attention takes and makes, sums, products.

A function mode is active while the model's forward runs. It counts calls by the module that runs, so that the same
value of every forward has the same name. What a product is shows only later: that it was QKᵀ, when its softmax is
taken. So one forward is looked at first, in which values are followed from the product to the softmax and on.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flipproof.spaces import _unfused
from flipproof.spaces.sites import LAYERS, NeuronKind

Place = tuple[str, str, int]
"""A layer, what a value is in its forward, and how many such values were computed before; the role "" is its output."""

Look = Callable[[Place, Tensor], Tensor | None]
"""Given a place and its value: the value to go on with, or None for the same."""


def kind_of(module: nn.Module) -> NeuronKind | None:
    """Which kind of values a module's output is; None if it is none.

    Normalisation of other libraries is known by its name, a Hugging Face activation by where it is from.

    >>> kind_of(nn.Conv2d(1, 1, 1)), kind_of(nn.RMSNorm(3)), kind_of(nn.Sequential())
    ('conv', 'norm', None)
    """
    for kind, types in _MODULES.items():
        if isinstance(module, types):
            return kind
    if any(True for _ in module.children()):
        return None
    kinds = [base for base in type(module).__mro__ if base is not nn.Module]
    if any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in kinds):
        return "linear"
    if any(base.__module__ == "transformers.activations" for base in kinds):
        return "activation"
    return "norm" if "Norm" in type(module).__name__ else None


_MODULES: dict[NeuronKind, tuple[type[nn.Module], ...]] = {
    "conv": (_ConvNd,),
    "linear": (nn.Linear,),
    "recurrent": (nn.LSTM, nn.GRU),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "norm": (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    "activation": (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
        *(nn.GLU, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    ),
}


def _functions(*names: str) -> set[Any]:
    """All that torch has under these names, as functions and as methods."""
    homes = (torch, F, Tensor, torch.special)
    return {getattr(home, name) for name in names for home in homes if hasattr(home, name)}


_ATTENTION = F.scaled_dot_product_attention
_WHOLE_ATTENTION = F.multi_head_attention_forward
_SOFTMAX = _functions("softmax")
_SUMS = _functions("add", "add_", "__add__", "__iadd__")
_SCALED = _functions("mul", "mul_", "multiply", "__mul__", "__imul__")
_PAIRS = _functions("matmul", "bmm", "mm", "__matmul__")
_PRODUCTS = _PAIRS | _functions(
    *("addmm", "baddbmm", "addbmm", "einsum", "tensordot", "linear", "bilinear", "mv", "addmv"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
_OTHERS: dict[Any, NeuronKind] = {
    **dict.fromkeys(_functions("embedding", "embedding_bag"), "embedding"),
    **dict.fromkeys(_functions("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"), "norm"),
    **dict.fromkeys(
        _functions(
            *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "celu", "selu"),
            *("gelu", "silu", "mish", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_"),
            *("softplus", "softsign", "logsigmoid", "glu", "threshold", "expit"),
        ),
        "activation",
    ),
}
_RECURRENT: dict[Any, Callable[..., Any]] = {torch.lstm: _unfused.lstm, torch.gru: _unfused.gru}
_CELLS = (torch.lstm_cell, torch.gru_cell)


_TRACED: Mapping[Any, Any] = {
    operator.add: Tensor.add,
    operator.iadd: Tensor.add_,
    operator.mul: Tensor.mul,
    operator.imul: Tensor.mul_,
    operator.matmul: Tensor.matmul,
}
"""What a run calls where a trace holds an operator of Python's."""
_TAKEN_APART = frozenset({"scores", "gates", "cell"})
"""Kinds for which kernels are computed step by step."""


class Traced(NamedTuple):
    """Where a trace holds a value.

    Attributes:
        node: that gives it, or takes it.
        argument: which argument of the node it is; None for what it gives.
        turned: whether the node has it with its last two axes exchanged.
    """

    node: fx.Node
    argument: int | None = None
    turned: bool = False


class _Raw(NamedTuple):
    """A call of a function: in which module's forward, of which name, and how many were before it."""

    layer: str
    function: str
    number: int


class Steps:
    """The values of these kinds that functions compute in a model's forward.

    Args:
        model: whose forward is followed.
        kinds: what is looked at.
    """

    def __init__(self, model: nn.Module, kinds: Collection[NeuronKind]) -> None:
        self._model, self.kinds = model, frozenset(kinds)
        self._meaning: dict[_Raw, str] = {}

    @property
    def wanted(self) -> bool:
        """Whether any kind is asked for that a function may compute."""
        return not self.kinds <= set(LAYERS)

    @property
    def keeps_kernels(self) -> bool:
        """Whether a forward computes the same bits while it is followed as while it is not."""
        fused = any(isinstance(module, nn.MultiheadAttention) for module in self._model.modules())
        return not fused and not self.kinds & _TAKEN_APART

    def again(self, model: nn.Module) -> Steps:
        """The same of a copy of the model."""
        found = Steps(model, self.kinds)
        found._meaning = self._meaning
        return found

    def learn(self, forward: Callable[[], object]) -> None:
        """Run the model once and find out what its products and sums are."""
        follow = _Following(self._model, self.kinds)
        with _active(self._model, follow):
            forward()
        self._meaning = follow.meaning

    def traced(self, nodes: Sequence[fx.Node]) -> dict[Place, Traced]:
        """Where a trace of the model holds these values; none of those inside of modules that it does not enter.

        Calls are counted along the trace as they are in a run. Nothing is found where kernels are taken apart: no trace
        does that.
        """
        if not self.keeps_kernels:
            return {}
        found: dict[Place, Traced] = {}
        calls: Counter[tuple[str, str]] = Counter()

        def note(layer: str, kind: NeuronKind, role: str, where: Traced) -> None:
            if kind in self.kinds:
                found[layer, role, calls[layer, f":{role}"]] = where
                calls[layer, f":{role}"] += 1

        modules = dict(self._model.named_modules())
        for node in nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            stack = list(node.meta.get("nn_module_stack", {}).values())
            layer = str(stack[-1][0]) if stack else ""
            target: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
            func = _TRACED.get(target, target)
            name, kind = str(getattr(func, "__name__", "")), kind_of(modules[layer])
            if func is _ATTENTION:
                roles: tuple[NeuronKind, ...] = ("query", "key", "value")
                for argument, role in enumerate(roles):
                    note(layer, role, role, Traced(node, argument))
                note(layer, "context", "context", Traced(node))
            elif func in _PRODUCTS or func in _SOFTMAX or func in _SUMS or func in _SCALED:
                meaning = self._meaning.get(_Raw(layer, name, calls[layer, name]))
                calls[layer, name] += 1
                if meaning == "scores":
                    first = 1 if name == "baddbmm" else 0
                    note(layer, "query", "query", Traced(node, first))
                    note(layer, "key", "key", Traced(node, first + 1, turned=True))
                elif meaning == "context":
                    note(layer, "value", "value", Traced(node, 1))
                    note(layer, "context", "context", Traced(node))
                elif meaning == "residual":
                    note(layer, "residual", "residual", Traced(node))
                elif meaning is None and func in _PRODUCTS and kind is None:
                    note(layer, "functional", name, Traced(node))
            elif (other := _OTHERS.get(func)) is not None and kind != other:
                note(layer, other, name.rstrip("_"), Traced(node))
        return found

    @contextmanager
    def watched(self, look: Look) -> Iterator[None]:
        """While active, `look` sees every value, each time the model's forward runs, and may change it."""
        if not self.wanted:
            yield
            return
        with _active(self._model, _Watching(self._model, self.kinds, self._meaning, look)):
            yield


@contextmanager
def _active(model: nn.Module, mode: _Mode) -> Iterator[None]:
    """While active, the mode is on from the beginning of the model's forward to its end.

    It is entered by hooks, in whatever thread or process the forward runs.
    """
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(mode.begin))
        handles.append(module.register_forward_hook(mode.end, always_call=True))
    try:
        yield
    finally:
        mode.leave()  # an interrupt skips the hooks
        for handle in handles:
            handle.remove()


class _Mode(TorchFunctionMode):
    """Knows which module runs, and how often it called what."""

    def __init__(self, model: nn.Module, kinds: frozenset[NeuronKind]) -> None:
        super().__init__()
        self.kinds = kinds
        self.running: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            self._names.setdefault(module, name)
        self._calls: Counter[tuple[str, str]] = Counter()
        self._model, self._on = model, False

    def begin(self, module: nn.Module, args: Any) -> None:
        """A module's forward begins."""
        if module is self._model:
            self.leave()
            self.running.clear()
            self._calls.clear()
            self._on = True
            self.__enter__()  # type: ignore[no-untyped-call]
        self.running.append(module)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        """It ended, or raised."""
        if module in self.running:
            del self.running[self.running.index(module) :]
        if module is self._model:
            self.leave()

    def leave(self) -> None:
        """The model's forward ended; does nothing where none had begun."""
        if self._on:
            self._on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.running:
            return func(*args, **kwargs)
        if func is _WHOLE_ATTENTION:
            with self:
                return _unfused.multi_head_attention(*args, **kwargs)
        return self.called(func, args, kwargs)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives that the module on top of `running` calls."""
        raise NotImplementedError

    def raw(self, func: Any) -> _Raw:
        """This call among those of its module; counts it."""
        layer, name = self._names[self.running[-1]], str(func.__name__)
        number = self._calls[layer, name]
        self._calls[layer, name] += 1
        return _Raw(layer, name, number)


class _Following(_Mode):
    """Follows products to the softmax that is taken of them, and says of each call what it was.

    Attributes:
        meaning: "scores" of a product whose softmax is taken, "softmax" of that, "context" of the product behind it,
            "residual" of a sum.
    """

    def __init__(self, model: nn.Module, kinds: frozenset[NeuronKind]) -> None:
        super().__init__(model, kinds)
        self.meaning: dict[_Raw, str] = {}
        self._tags: dict[int, tuple[Tensor, str, _Raw]] = {}

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls it, and notes what its result descends from."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tags = {id(leaf): self._tags[id(leaf)] for leaf in given if id(leaf) in self._tags}
        result = func(*args, **kwargs)
        raw = self.raw(func) if func in _PRODUCTS or func in _SOFTMAX or func in _SUMS or func in _SCALED else None
        if not isinstance(result, Tensor):
            return result
        first = tags.get(id(args[0])) if args else None
        if raw is not None and func in _SOFTMAX and first is not None and first[1] == "product":
            self.meaning |= {first[2]: "scores", raw: "softmax"}
            self._tag(result, "probabilities", raw)
        elif raw is not None and func in _PRODUCTS:
            if first is not None and first[1] == "probabilities" and func in _PAIRS:
                self.meaning[raw] = "context"
            elif _multiplied(func, args) is not None:
                self._tag(result, "product", raw)
        elif scores := [tag for tag in tags.values() if tag[1] != "scaled"]:
            if result.numel() == scores[0][0].numel():
                self._tag(result, scores[0][1], scores[0][2])
        elif raw is not None and func in _SCALED:
            self._tag(result, "scaled", raw)
        elif raw is not None and func in _SUMS and _alike(given, result) and len(tags) < len(given):
            # what a layer, a norm or an activation adds is its own affair
            self.meaning |= {raw: "residual"} if kind_of(self.running[-1]) is None else {}
        return result

    def leave(self) -> None:
        """Lets go of the values."""
        super().leave()
        self._tags.clear()

    def _tag(self, value: Tensor, what: str, raw: _Raw) -> None:
        self._tags[id(value)] = (value, what, raw)


def _alike(given: list[Tensor], result: Tensor) -> bool:
    """Whether two computed tensors of one shape were added: values of samples, no parameter and no bias."""
    two = len(given) == 2 and result.dim() > 1 and result.is_floating_point()
    return two and all(one.shape == result.shape and not isinstance(one, nn.Parameter) for one in given)


def _multiplied(func: Any, args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Where among its arguments a product has two computed factors; None if it has not.

    A matrix for each of several samples has three dimensions or more, which weights have not.
    """
    first = 1 if func.__name__ == "baddbmm" else 0
    if func not in _PAIRS and not first:
        return None
    both = args[first : first + 2]
    computed = [isinstance(one, Tensor) and not isinstance(one, nn.Parameter) and one.dim() > 2 for one in both]
    return (first, first + 1) if len(both) == 2 and all(computed) else None


class _Watching(_Mode):
    """Shows values to somebody who may change them."""

    def __init__(self, model: nn.Module, kinds: frozenset[NeuronKind], meaning: dict[_Raw, str], look: Look) -> None:
        super().__init__(model, kinds)
        self._meaning, self._look = meaning, look
        self._within = {module for module in model.modules() if kind_of(module) is not None}

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shows what it is given and what it gives, as far as that is asked for."""
        if func is _ATTENTION:
            return self._attention(*args, **kwargs)
        if func in _RECURRENT or func in _CELLS:
            return self._recurrent(func, args, kwargs)
        if func in _PRODUCTS or func in _SOFTMAX:
            return self._product(func, args, kwargs)
        if func in _SUMS or func in _SCALED:
            meaning = self._meaning.get(self.raw(func))
            result = func(*args, **kwargs)
            return self._seen("residual", "residual", result, args) if meaning == "residual" else result
        kind = _OTHERS.get(func)
        result = func(*args, **kwargs)
        if kind is None or kind_of(self.running[-1]) == kind:  # the output of that module is a site
            return result
        return self._seen(kind, str(func.__name__).rstrip("_"), result, args)

    def _seen(self, kind: NeuronKind, role: str, value: Any, given: tuple[Any, ...] = ()) -> Any:
        """A value as `look` lets it be; one that lies in the memory of an argument is changed there."""
        if kind not in self.kinds or not isinstance(value, Tensor):
            return value
        layer = self._names[self.running[-1]]
        number = self._calls[layer, f":{role}"]
        self._calls[layer, f":{role}"] += 1
        return self._shown((layer, role, number), value, given)

    def _shown(self, place: Place, value: Tensor, given: tuple[Any, ...] = ()) -> Tensor:
        changed = self._look(place, value)
        if changed is None:
            return value
        return value.copy_(changed) if any(value is one for one in given) else changed

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = dict(zip(names, args, strict=False)) | kwargs
        roles: tuple[NeuronKind, ...] = ("query", "key", "value")
        for role in roles:
            given[role] = self._seen(role, role, given[role])
        if "scores" in self.kinds:
            found = _unfused.attention(lambda role, _, value: self._seen("scores", role, value), **given)
        else:
            found = _ATTENTION(**given)
        return self._seen("context", "context", found)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        meaning = self._meaning.get(self.raw(func))
        given = list(args)
        if meaning == "scores":
            where = _multiplied(func, args)
            assert where is not None
            given[where[0]] = self._seen("query", "query", args[where[0]])
            turned = self._seen("key", "key", args[where[1]].transpose(-2, -1))
            given[where[1]] = turned.transpose(-2, -1)
        elif meaning == "softmax":
            given[0] = self._seen("scores", "scores", args[0])
        elif meaning == "context":
            given[1] = self._seen("value", "value", args[1])
        result = func(*given, **kwargs)
        if meaning == "softmax":
            return self._seen("scores", "probabilities", result)
        if meaning == "context":
            return self._seen("context", "context", result)
        if meaning is not None or func in _SOFTMAX or self.running[-1] in self._within:
            return result
        return self._seen("functional", str(func.__name__), result)

    def _recurrent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A recurrent layer, in steps where they are asked for; packed sequences and dropout are not."""
        if not self.kinds & {"gates", "cell"} or kwargs or (func in _RECURRENT and _is_packed_or_drops(args)):
            return func(*args, **kwargs)
        layer, before = self._names[self.running[-1]], self._calls[self._names[self.running[-1]], func.__name__]
        self._calls[layer, func.__name__] += 1

        def look(role: str, t: int, value: Tensor) -> Tensor:
            kind: NeuronKind = "cell" if role.startswith(("cell", "state")) else "gates"
            return self._shown((layer, role, before * length + t), value) if kind in self.kinds else value

        if func in _RECURRENT:
            x, state, weights, biases, layers, _, _, both_ways, batch_first = args
            length = x.shape[1 if batch_first else 0]
            return _RECURRENT[func](look, x, state, weights, biases, layers, both_ways, batch_first)
        length = 1
        x, state, w_ih, w_hh, b_ih, b_hh = args
        if func is torch.lstm_cell:
            h, c = state
            return _unfused.lstm_step(look, "", 0, F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh), c)
        return _unfused.gru_step(look, "", 0, F.linear(x, w_ih, b_ih), F.linear(state, w_hh, b_hh), state)


def _is_packed_or_drops(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer reads a packed sequence, whose second argument is sizes of batches, or drops values."""
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    return packed or len(args) != 9 or bool(args[6])
