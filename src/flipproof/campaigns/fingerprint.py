"""What a campaign is a campaign of: a digest of everything that changes an answer.

Code counts too: a `forward` that was changed has the same name and the same `repr`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cached_property, partial, partialmethod
from hashlib import blake2b
from re import sub
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flipproof.campaigns.plan import Fingerprint
from flipproof.campaigns.trial import TrialRunner
from flipproof.errors import ConfigError
from flipproof.faults.base import FaultModel
from flipproof.running.data import Output, tensor_bytes
from flipproof.running.decision import Decision
from flipproof.running.judge import Judge
from flipproof.running.snapshots import LIBRARIES, RECORDS, of_library, slots_of
from flipproof.running.straight import global_hooks, names_in
from flipproof.running.tasks.base import Rows
from flipproof.running.ways import DEPLOYMENT
from flipproof.spaces.contract import Space
from flipproof.spaces.quantised import parts
from flipproof.spaces.tensors import elsewhere

_LIBRARIES = LIBRARIES | {"torchmetrics", "torchvision", "transformers", "timm"}
"""Packages whose code is known by the name of what it defines."""
_OWN_WORDS = frozenset({"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set", DEPLOYMENT})


def fingerprint_of(runner: TrialRunner, faults: FaultModel, where: object) -> Fingerprint:
    """The fingerprint of a campaign, after its golden run.

    Args:
        runner: of its trials.
        faults: the whole sweep.
        where: what can be hit.
    """
    faulty, space = runner.faulty, runner.space
    model = faulty.model
    return Fingerprint(
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        structure=_hash(sub(" at 0x[0-9a-f]+", "", repr(model)).encode()),  # addresses differ every run
        weights=_weights_digest(model, space),
        data=faulty.batches.digest(),
        samples=faulty.batches.samples,
        faults=repr(faults),
        where=repr(where),
        format=_hash(repr([(s.name, s.shape, repr(s.format)) for s in space.sites]).encode()),
        bits=space.bits,
        metrics=tuple(metric.name for metric in runner.metrics),
        metrics_code=digest_of([metric.function for metric in runner.metrics]),
        seed=runner.seed,
        device=runner.device.type,
        output=_name_of(faulty.output.output if isinstance(faulty.output, Rows) else faulty.output),
        output_code=digest_of(faulty.output),
        attributes=attributes_digest(model),
        code=code_digest(model),
        golden_outputs=_hash(tensor_bytes(faulty.golden)),
        decision=rule_of(runner.judge),
    )


def _weights_digest(model: nn.Module, space: Space) -> str:
    """A hash of every parameter and buffer, as the user gave them (not as a format decodes them)."""
    state = blake2b(digest_size=16)
    originals = space.originals()
    registered = [*model.named_parameters(), *model.named_buffers()]
    named = [part for name, tensor in registered for part in parts(name, tensor)]
    for name, tensor in [*named, *elsewhere(model)]:
        state.update(name.encode())
        state.update(tensor_bytes(originals.get(name, tensor)))
    return state.hexdigest()


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def _name_of(output: Output) -> str | int | None:
    return getattr(output, "__qualname__", type(output).__name__) if callable(output) else output


def digest_of(*values: Any) -> str:
    """Sixteen hex digits that tell values apart by content, functions by their code.

    Functions count with their bytecode, constants, defaults, what they close over and the globals that they name;
    classes outside libraries with all their functions; objects with their attributes; tensors and arrays with every
    bit. What cannot be looked into counts with the name of its type.

    Raises:
        ConfigError: if values hold each other too deep to be looked into.

    Example:
        >>> digest_of({"high": 1.0}) == digest_of({"high": 1.0}), digest_of({"high": 1.0}) == digest_of({"high": 2.0})
        (True, False)
    """
    walk = _Walk()
    for value in values:
        try:
            walk.feed(value)
        except RecursionError:
            raise ConfigError(
                f"what a {type(value).__name__} of the model, the metrics or output= refers to (attributes, closures, "
                f"globals that its functions name) nests too deep for a campaign to be told from another one by it; "
                f"let it refer to less"
            ) from None
    return walk.state.hexdigest()


def rule_of(judge: Judge) -> str:
    """How answers are judged, in words; of tasks that may be given functions, with a digest of these."""
    return judge.describe() if isinstance(judge, Decision) else f"{judge.describe()} ({digest_of(vars(judge))})"


def attributes_digest(model: nn.Module) -> str:
    """A digest of what every module holds besides parameters, buffers and other modules."""
    return digest_of(
        [
            (name, type(module).__qualname__, {k: v for k, v in vars(module).items() if k not in _OWN_WORDS})
            for name, module in model.named_modules()
        ]
    )


def code_digest(model: nn.Module) -> str:
    """A digest of the code of all classes of modules that are no library's."""
    kinds = {type(module) for module in model.modules()}
    everywhere = [list(hooks.values()) for hooks in global_hooks()]
    return digest_of(sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)), everywhere)


class _Walk:
    """Feeds values to a hash, each object once."""

    def __init__(self) -> None:
        self.state = blake2b(digest_size=8)
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []

    def feed(self, value: Any) -> None:
        """Hash one value and what it holds."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum)):
            self._word(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._word("again", str(self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)  # its identity stays taken
        self._word(type(value).__qualname__)
        if isinstance(value, Tensor):
            self._bytes(b"meta" if value.is_meta else tensor_bytes(value) if value.layout == torch.strided else b"")
        elif isinstance(value, np.ndarray):
            self._bytes(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            self._all([len(value), *(part for pair in _sorted(value.items()) for part in pair)])
        elif isinstance(value, (set, frozenset)):
            self._set(value)
        elif isinstance(value, (list, tuple)):
            self._all([len(value), *value])
        elif isinstance(value, partial):
            self._all([value.func, value.args, value.keywords])
        elif isinstance(value, MethodType):
            self._all([value.__func__, None if isinstance(value.__self__, nn.Module) else value.__self__])
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (ModuleType, BuiltinFunctionType)):
            self._word(value.__name__)
        elif isinstance(value, torch.jit.ScriptFunction):
            self._word(str(value.code))
        elif hasattr(value, "__wrapped__"):  # functools.lru_cache and its like
            self.feed(value.__wrapped__)
        elif isinstance(value, (partialmethod, cached_property)):
            self._all([value.func, getattr(value, "args", None), getattr(value, "keywords", None)])
        elif isinstance(value, nn.Module):
            self._all([type(value), {k: v for k, v in vars(value).items() if k not in _OWN_WORDS}])
            self._all([*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)])
            self._all(value.named_children())
        elif not of_library(type(value), _LIBRARIES) or isinstance(value, RECORDS):
            slots = [slot for kind in type(value).__mro__ for slot in slots_of(kind) if hasattr(value, slot)]
            held = {slot: getattr(value, slot) for slot in slots}
            self._all([type(value), getattr(value, "__dict__", {}), held])

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.feed(value)

    def _set(self, parts: set[Any] | frozenset[Any]) -> None:
        """A set, which has no order: classes and functions by their names, anything else by its digest.

        The digest is of a walk that knows what this one has seen, since a part may lead back to the set that holds it.
        """
        code = [part for part in parts if isinstance(part, (type, FunctionType))]
        named = {f"{part.__module__}.{part.__qualname__}": part for part in code}
        if len(named) < len(code):  # lambdas of one place
            named = {}
        digests = []
        for part in parts.difference(named.values()):
            walk = _Walk()
            walk._seen = dict(self._seen)
            walk.feed(part)
            digests.append(walk.state.hexdigest())
        self._all([len(parts), *sorted(digests)])
        for name, part in sorted(named.items()):
            self._word(name)
            self.feed(part)

    def _function(self, function: FunctionType) -> None:
        known = of_library(function, _LIBRARIES)
        if known:
            self._word(function.__module__, function.__qualname__)
        else:
            self._code(function.__code__)
        self._all([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            try:
                self.feed(cell.cell_contents)
            except ValueError:  # a name that was not assigned yet
                self._word("empty")
        for name in () if known else sorted(names_in(function.__code__)):
            if name in function.__globals__:
                self._word(name)
                self._global(function.__globals__[name], function)

    def _global(self, value: Any, function: FunctionType) -> None:
        """A global that a function names; of a module of the user's own, what the function may take from it."""
        if not isinstance(value, ModuleType) or value.__name__.partition(".")[0] in _LIBRARIES:
            self.feed(value)
            return
        self._word(value.__name__)
        for name in sorted(names_in(function.__code__)):
            if name in vars(value):
                self._word(name)
                self._global(vars(value)[name], function)

    def _code(self, code: CodeType) -> None:
        self._bytes(code.co_code)
        self._word(*code.co_names, *code.co_freevars)
        self._all(code.co_consts)

    def _class(self, kind: type) -> None:
        self._word(kind.__module__ if of_library(kind, _LIBRARIES) else "", kind.__qualname__)
        if of_library(kind, _LIBRARIES):
            return
        for name, value in sorted(vars(kind).items()):
            if name.startswith("__") and not callable(value):
                continue
            self._word(name)
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, property):
                self._all([value.fget, value.fset])
            else:
                self.feed(value)
        self._all(kind.__bases__)

    def _word(self, *words: str) -> None:
        for word in words:
            self._bytes(word.encode(errors="surrogatepass"))

    def _bytes(self, content: bytes) -> None:
        self.state.update(len(content).to_bytes(8, "little"))
        self.state.update(content)


def _sorted(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Pairs in an order that does not depend on when each was put there; keys that count up are dropped.

    Torch numbers hooks through the whole process, so that the number of a hook says nothing about the model.
    """
    return sorted(
        ((None if isinstance(key, int) else key, value) for key, value in pairs), key=lambda pair: str(pair[0])
    )
