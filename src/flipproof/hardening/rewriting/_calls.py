"""One run of a model with every activation call noted: who called what, in which order, from which module."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic.modules import rnn as dynamic
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flipproof.hardening.bounds.activations import CALLABLES, Activation, function_of, is_foreign
from flipproof.hardening.rewriting.recurrent import Opened

Pattern = tuple[tuple[str, Any], ...]
"""How a forward was called: (parameter, `TENSOR` or the plain value that it got), in the order of its signature."""


_RECURRENT = (nn.RNNBase, nn.RNNCellBase, dynamic.RNNBase, dynamic.RNNCellBase)
"""Layers that hide their gates, PyTorch's own and those that torch.ao quantises as it goes."""


class _Tensor:
    """Stands for "a tensor, or something that holds one" in a pattern; equal to itself after pickling too."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor)

    def __hash__(self) -> int:
        return hash(_Tensor)

    def __repr__(self) -> str:
        return "TENSOR"


TENSOR = _Tensor()


@dataclass(frozen=True)
class Call:
    """One activation computed while a module's own forward ran.

    Attributes:
        function: its name in `FUNCTIONS`.
        module: the activation module called, None for a function or method.
    """

    function: str
    module: nn.Module | None


@dataclass
class Watch(TorchFunctionMode):
    """Context in which a model's run is noted. Composite modules are told apart from activation modules.

    Attributes:
        calls: composite module → one list of activation calls for each time its forward ran.
        patterns: composite module → how it was called, every distinct way once; None where that cannot be said.
        order: activation modules in the order of their calls.
        recurrent: modules that hide their activations in a kernel of their own.
    """

    model: nn.Module
    calls: dict[nn.Module, list[list[Call]]] = field(default_factory=lambda: defaultdict(list))
    patterns: dict[nn.Module, list[Pattern | None]] = field(default_factory=lambda: defaultdict(list))
    order: list[nn.Module] = field(default_factory=list)
    recurrent: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._running: list[tuple[nn.Module, list[Call]]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and shows nothing of what it computes
                continue
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if (known := CALLABLES.get(func)) and self._running and not _computes(self._running[-1][0]):
            self._running[-1][1].append(Call(known[0], None))
        return func(*args, **(kwargs or {}))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = module.function if isinstance(module, Activation) else function_of(module)
        if name is not None and self._running:
            self._running[-1][1].append(Call(name, module))
            self.order.append(module)
        noted: list[Call] = []
        if name is None:
            self.calls[module].append(noted)
            pattern = _pattern(module, args, kwargs)
            if pattern not in self.patterns[module]:
                self.patterns[module].append(pattern)
        hidden = isinstance(module, _RECURRENT) and not isinstance(module, Opened)
        if hidden and module not in self.recurrent:
            self.recurrent.append(module)
        self._running.append((module, noted))

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running.pop()


def _computes(module: nn.Module) -> bool:
    return isinstance(module, Activation) or function_of(module) is not None or is_foreign(module)


def _pattern(module: nn.Module, args: Any, kwargs: Any) -> Pattern | None:
    """None if the call does not fit a signature of named parameters, or a plain value is of no simple kind."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    found: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            if value:
                return None
        elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            found.append((name, TENSOR))
        elif _plain(value) or (isinstance(value, tuple) and all(map(_plain, value))):
            found.append((name, value))
        else:
            return None
    return tuple(found)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
