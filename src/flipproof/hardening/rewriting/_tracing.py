"""Giving every activation call inside one module's forward a bound of its own.

The forward is traced by `torch.fx` with the module's children as leaves, its activation calls are replaced by calls of
new child modules, and the module gets the result as its forward. It stays an instance of its own class, with its
attributes, methods, hooks and `state_dict` names, and its parent keeps calling it; only `forward` is another.

What a trace would silently get wrong is refused: tensors made in the forward, attributes that it changes, `no_grad`
and `autocast` blocks. Dropout and the like that depend on `self.training` are traced in both states.
"""

from __future__ import annotations

import copyreg
import inspect
import linecache
import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from flipproof.errors import ModelError
from flipproof.hardening.bounds.activations import CALLABLES, METHODS, Activation, function_of
from flipproof.hardening.rewriting._calls import TENSOR, Call, Pattern
from flipproof.running.tracing import Tracer


class Untraceable(Exception):
    """Why a forward cannot be rewritten."""


@dataclass(frozen=True)
class Replacement:
    """What to do about one activation call of a traced forward.

    Attributes:
        function: the activation, to check that a forward traced again is still the same.
        child: the name of the module that bounds it: called instead of ReLU and of activation modules, after others.
            None leaves the call alone.
    """

    function: str
    child: str | None


@dataclass(frozen=True)
class Rewriting:
    """All that is needed to rewrite a forward, also in another process."""

    pattern: Pattern
    replacements: tuple[Replacement, ...]


@dataclass(frozen=True)
class TracedCall:
    """One activation call in a traced forward.

    Attributes:
        function: its name in `FUNCTIONS`.
        target: qualified name of the activation module relative to the traced one; None for functions and methods.
        inplace: whether it works in place, None if that is computed at run time.
    """

    function: str
    target: str | None
    inplace: bool | None


def activation_calls(module: nn.Module, pattern: Pattern, expected: Sequence[Call]) -> list[TracedCall]:
    """The activation calls in a module's forward, in order, if they can be rewritten.

    Args:
        module: whose own forward is meant, not its children's.
        pattern: how it is called.
        expected: the calls that a real run made.

    Raises:
        Untraceable: if the forward cannot be traced, or the trace makes other calls.
    """
    found: list[TracedCall] = []
    for training in (False, True):
        graph = _trace(module, pattern, training)
        found = [_describe(module, node) for node in _activation_nodes(module, graph)]
        if [call.function for call in found] != [call.function for call in expected]:
            state = " in training mode" if training else ""
            raise Untraceable(
                f"its traced forward{state} computes {[call.function for call in found]}, "
                f"a real run {[call.function for call in expected]}"
            )
    return found


def rewrite_forward(module: nn.Module, rewriting: Rewriting) -> None:
    """Give the module the rewritten forward; its replacements must already be children of it.

    Raises:
        Untraceable: if it cannot be traced, or not as `rewriting` says.
    """
    if isinstance(module, fx.GraphModule):
        graph = deepcopy(module.graph)
        _replace(module, graph, rewriting)
        module.graph = graph
        return
    current = type(module)
    module.__class__ = _subclass(_class_of(module), rewriting)
    try:
        _compile(module)
    except BaseException:
        module.__class__ = current
        raise


def restore_forward(module: nn.Module) -> None:
    """Take a rewritten forward back."""
    original = _class_of(module)
    if type(module) is not original:
        module.__class__ = original


class BoundedForward(nn.Module):
    """Mixed into the class of a module whose forward was rewritten; knows how to copy and pickle it."""

    _original: type[nn.Module]
    _rewriting: Rewriting

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the original class, plus what to rewrite: the forward is traced again where it is loaded."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] not in (copyreg.__newobj__, copyreg.__reduce_ex__):  # type: ignore[attr-defined]
            raise pickle.PicklingError(
                f"{self._original.__qualname__} pickles itself in its own way, which would lose the bounds; "
                f"save the hardened model's state_dict instead"
            )
        return _revive, (self._original, self._rewriting), self.__getstate__()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _compile(self)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    return module._original if isinstance(module, BoundedForward) else type(module)


def _revive(original: type[nn.Module], rewriting: Rewriting) -> nn.Module:
    subclass = _subclass(original, rewriting)
    return subclass.__new__(subclass)


def _subclass(original: type[nn.Module], rewriting: Rewriting) -> type[nn.Module]:
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        "_rewriting": rewriting,
    }
    return type(original.__name__, (BoundedForward, original), namespace)


def _compile(module: nn.Module) -> None:
    """Trace, replace, and put the generated forward on the module's own class."""
    assert isinstance(module, BoundedForward)
    rewriting = module._rewriting
    graphs = []
    for training in (False, True):
        graph = _trace(module, rewriting.pattern, training)
        _replace(module, graph, rewriting)
        graphs.append(graph)
    bodies = [_function(graph, type(module).__qualname__) for graph in graphs]
    both = bodies[0][1] == bodies[1][1]
    forward = _dispatcher(module, rewriting.pattern, bodies[0][0], bodies[0 if both else 1][0])
    type(module).forward = forward


# --- tracing -------------------------------------------------------------------------------------------------------


class _Tracer(Tracer):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self._pattern = pattern
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        values = {
            name: self.create_proxy("placeholder", name, (), {}) if value == TENSOR else value
            for name, value in self._pattern
        }
        kinds = inspect.signature(root_fn).parameters
        positional = [v for name, v in values.items() if kinds[name].kind is not inspect.Parameter.KEYWORD_ONLY]
        keyword = {n: v for n, v in values.items() if kinds[n].kind is inspect.Parameter.KEYWORD_ONLY}

        def call(root: nn.Module) -> Any:
            return root_fn(root, *positional, **keyword)

        return call, [self.root]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not self._belongs(a):
            raise Untraceable("makes a tensor in its forward")
        return super().create_arg(a)

    def _belongs(self, a: Tensor) -> bool:
        return isinstance(a, nn.Parameter) or a in self.tensor_attrs or any(a is b for b in self.root.buffers())

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        if _modes() != self._modes:
            raise Untraceable("switches gradients or autocast on or off in its forward")
        return super().create_proxy(kind, *args, **kwargs)


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _trace(module: nn.Module, pattern: Pattern, training: bool) -> fx.Graph:
    if isinstance(module, fx.GraphModule):
        return module.graph
    if "forward" in vars(module):
        raise Untraceable("has a forward set on the instance")
    before = dict(vars(module))
    flag = module.training
    module.training = training
    current = type(module)
    module.__class__ = _class_of(module)
    try:
        # without gradients in one state and with them in the other: a forward that sets either is seen to change it
        with torch.set_grad_enabled(training):
            graph = _Tracer(pattern).trace(module)
    except Untraceable:
        raise
    except Exception as error:  # whatever a forward does with a proxy
        lines = str(error).strip().splitlines() or [""]
        raise Untraceable(
            f"cannot be traced ({type(error).__name__}: {lines[0][:200]}); an activation that is a module of its own, "
            f"such as nn.ReLU, needs no trace"
        ) from error
    finally:
        module.__class__ = current
        module.training = flag
        after = dict(vars(module))
        changed = [name for name in after if name not in before or after[name] is not before[name]]
        for name in changed:
            vars(module).pop(name)
        vars(module).update({name: value for name, value in before.items() if name != "training"})
    held = [leaf for name, value in vars(module).items() if name[:1] != "_" for leaf in pytree.tree_leaves(value)]
    if [name for name in changed if name != "training"] or any(isinstance(leaf, fx.Proxy) for leaf in held):
        raise Untraceable(f"changes its own attributes {changed} in its forward")
    return graph


def _activation_nodes(module: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if _function_name(module, node) is not None]


def _function_name(module: nn.Module, node: fx.Node) -> str | None:
    if node.op == "call_function":
        return CALLABLES.get(node.target, (None, False))[0]
    if node.op == "call_method":
        return METHODS.get(str(node.target), (None, False))[0]
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return called.function if isinstance(called, Activation) else function_of(called)
    return None


def _describe(module: nn.Module, node: fx.Node) -> TracedCall:
    name = _function_name(module, node)
    assert name is not None
    if node.op == "call_module":
        return TracedCall(name, str(node.target), None)
    always = (METHODS[str(node.target)] if node.op == "call_method" else CALLABLES[node.target])[1]
    inplace: Any = always or node.kwargs.get(
        "inplace", node.args[1] if name == "relu" and len(node.args) > 1 else False
    )
    return TracedCall(name, None, inplace if isinstance(inplace, bool) else None)


def _replace(module: nn.Module, graph: fx.Graph, rewriting: Rewriting) -> None:
    nodes = _activation_nodes(module, graph)
    names = [_function_name(module, node) for node in nodes]
    wanted = [replacement.function for replacement in rewriting.replacements]
    if names != wanted:
        raise Untraceable(f"its forward computes {names} now, but {wanted} when it was hardened")
    for node, replacement in zip(nodes, rewriting.replacements, strict=True):
        if replacement.child is None:
            continue
        if node.op == "call_module":
            node.target = replacement.child
            continue
        with graph.inserting_after(node):
            if replacement.function == "relu":
                source = node.args[0] if node.args else node.kwargs["input"]
                new = graph.call_module(replacement.child, (source,))
                node.replace_all_uses_with(new)
                graph.erase_node(node)
            else:
                new = graph.call_module(replacement.child, (node,))
                node.replace_all_uses_with(new)
                new.args = (node,)
    graph.lint()


# --- from a graph to a function ------------------------------------------------------------------------------------

_numbers = count()


def _function(graph: fx.Graph, name: str) -> tuple[Callable[..., Any], str]:
    """The graph as a function of the module and its tensors, with its source."""
    code = graph.python_code("self")
    return _execute(code.src, dict(code.globals), name), code.src


def _execute(source: str, namespace: dict[str, Any], name: str) -> Any:
    filename = f"<bounded forward of {name}, {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    return namespace["forward"]


def _dispatcher(
    module: nn.Module, pattern: Pattern, evaluation: Callable[..., Any], training: Callable[..., Any]
) -> Callable[..., Any]:
    """A forward with the original's signature, which refuses calls of another kind than it was traced for."""
    original: Any = _class_of(module)
    parameters = list(inspect.signature(original.forward).parameters.values())
    namespace: dict[str, Any] = {"_evaluation": evaluation, "_training": training, "_refuse": _refuse}
    known = dict(pattern)
    heads: list[str] = [parameters[0].name]
    lines: list[str] = []
    keyword_only = False
    for parameter in parameters[1:]:
        name = parameter.name
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            heads.append(f"*{name}")
            keyword_only = True
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            heads.append(f"**{name}")
        else:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
                heads.append("*")
                keyword_only = True
            if parameter.default is inspect.Parameter.empty:
                heads.append(name)
            else:
                namespace[f"_default_{name}"] = parameter.default
                heads.append(f"{name}=_default_{name}")
        if name not in known:  # *args or **kwargs, which were empty
            lines.append(f"    if {name}: _refuse({heads[0]}, {name!r}, {name})")
        elif known[name] != TENSOR:
            namespace[f"_traced_{name}"] = known[name]
            differs = f"{name} is not None" if known[name] is None else f"{name} != _traced_{name}"
            lines.append(f"    if {differs}: _refuse({heads[0]}, {name!r}, {name})")
        elif parameter.default is None:
            lines.append(f"    if {name} is None: _refuse({heads[0]}, {name!r}, {name})")
    given = ", ".join([heads[0], *(name for name, value in pattern if value == TENSOR)])
    if evaluation is training:
        lines.append(f"    return _evaluation({given})")
    else:
        lines.append(f"    return _training({given}) if {heads[0]}.training else _evaluation({given})")
    source = f"def forward({', '.join(heads)}):\n" + "\n".join(lines) + "\n"
    return _execute(source, namespace, original.__qualname__)  # type: ignore[no-any-return]


def _refuse(module: nn.Module, name: str, value: object) -> None:
    assert isinstance(module, BoundedForward)
    shown = type(value).__name__ if isinstance(value, Tensor) else repr(value)
    raise ModelError(
        f"{type(module).__qualname__} was hardened for calls with {dict(module._rewriting.pattern)}, and now got "
        f"{name}={shown}; harden the model with data that calls it this way"
    )
