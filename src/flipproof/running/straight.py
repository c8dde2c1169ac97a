"""Whether a trace of a model is all that its forward can do.

`torch.fx` runs a forward once with stand-ins for tensors and writes down what is computed. It does not see what the
forward would do with other values: an `except` that only a fault reaches, a check of a type that a stand-in fails, a
number read off a weight while tracing. So a model is traced only if the code that runs is straight: no exception
handling, no questions about types, and no value of a real tensor read.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

T = TypeVar("T")

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
_MODELS = str(Path(_OURS, "models"))
_PYTHON = str(Path(dis.__file__).parent)
_QUESTIONS = frozenset({isinstance, issubclass, hasattr, callable, id, hash})
_QUESTIONS_BY_NAME = frozenset({"type", "isinstance", "issubclass", "hasattr", "callable", "vars", "eval", "exec"})
_ASKED_OF_SHAPE = frozenset(
    {"__get__", "size", "dim", "stride", "numel", "element_size", "is_floating_point", "is_complex", "is_contiguous",
     "get_device", "__len__", "ndimension", "nelement", "__hash__"}
)  # fmt: skip
_CALLABLE_PARTS = (
    "torch.nn", "torch.fx", "torch.functional", "torch._tensor", "torch.jit", "torch._jit_internal", "flipproof",
    "collections", "enum", "operator", "typing",
)  # fmt: skip
"""What a forward may call of libraries while it is traced; other parts look at what they are given."""


class CrookedError(Exception):
    """Something that a trace would lose."""


def run_straight(function: Callable[[], T]) -> T:
    """Run a function, in which all code outside torch has to be straight.

    Raises:
        CrookedError: saying what is not.
    """
    found: list[str] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            _called(frame, found)
        elif event == "c_call" and _is_users(frame.f_code) and argument in _QUESTIONS:
            found.append(f"{frame.f_code.co_qualname} calls {argument.__name__}")

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # finalizers would run in the middle of a forward, and look like a part of it
    try:
        with _Reads(found):
            sys.setprofile(watch)
            try:
                result = function()
            finally:
                sys.setprofile(before)
    finally:
        if collecting:
            gc.enable()
    if found:
        raise CrookedError(found[0])
    return result


def _called(frame: FrameType, found: list[str]) -> None:
    code = frame.f_code
    if _is_users(code):
        if reason := _crooked(code):
            found.append(f"{code.co_qualname} {reason}")
        return
    caller = frame.f_back
    module = str(frame.f_globals.get("__name__", ""))
    if caller is None or not _is_users(caller.f_code):
        return
    if not any(module == part or module.startswith(part + ".") for part in _CALLABLE_PARTS):
        found.append(f"{caller.f_code.co_qualname} calls {module}.{code.co_qualname}")


@cache
def _is_users(code: CodeType) -> bool:
    """Whether code is neither torch's nor ours (but for our networks), nor Python's own, nor what fx generates."""
    name = code.co_filename
    if name.startswith((_TORCH, _OURS, "<eval_with_key", "<frozen", "<__array")):
        return name.startswith(_MODELS)
    return not name.startswith(_PYTHON) or "site-packages" in name


@cache
def _crooked(code: CodeType) -> str | None:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "PUSH_EXC_INFO":
            return "has try or with"
        if instruction.opname in ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"):
            return "matches patterns"
        asked = instruction.argval in _QUESTIONS_BY_NAME and instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        if asked or (instruction.argval == "__class__" and instruction.opname == "LOAD_ATTR"):
            return f"asks {instruction.argval}"
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"writes the global {instruction.argval}"
    return None


class _Reads(TorchFunctionMode):
    """Notes every computation on real tensors alone: its result would be a constant of the trace."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        name = getattr(function, "__name__", "")
        stand_in = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if name not in _ASKED_OF_SHAPE and not stand_in and any(isinstance(leaf, Tensor) for leaf in leaves):
            self._found.append(f"the forward reads a tensor's values while it is traced ({name})")
        return function(*args, **(kwargs or {}))


def global_hooks() -> list[dict[int, Any]]:
    """Hooks that run at the forward of every module (`torch.nn.modules.module.register_module_forward_hook`)."""
    return [module._global_forward_hooks, module._global_forward_pre_hooks]


def refers_to_tensors(function: Callable[..., Any]) -> bool:
    """Whether a function can reach a tensor or a module other than through its arguments, or cannot be looked into."""
    pending: list[Any] = [function]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, nn.Module)):
            return True
        if isinstance(value, partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            pending += [value.__func__, value.__self__]
        elif isinstance(value, FunctionType):
            if value.__code__.co_filename.startswith(_TORCH):
                continue
            pending += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            pending += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            pending += [value.__globals__[name] for name in names_in(value.__code__) if name in value.__globals__]
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += value
        elif not isinstance(value, type) and type(value).__module__ not in ("builtins", "torch", "operator"):
            pending += list(getattr(value, "__dict__", {}).values()) if not _is_module(value) else []
    return False


def _is_module(value: Any) -> bool:
    return type(value).__name__ == "module"


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # not assigned yet
        return False
    return True


def names_in(code: CodeType) -> set[str]:
    """Names that a function and the functions inside it look up; not those that pytest writes into an `assert`."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return {*filter(str.isidentifier, code.co_names), *(name for part in inner for name in names_in(part))}
