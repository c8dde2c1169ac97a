"""Everything that a forward can write, as it was: checked after every batch and put back.

A model may change while it answers: observers widen their ranges, `nn.Embedding(max_norm=…)` shrinks its weights,
BatchNorm in train mode moves its statistics, a Python attribute latches. What one trial leaves behind would be the next
trial's input. So parameters, buffers, module attributes and whatever these hold are recorded once; after every batch
they are compared (tensors by version and address, everything else by identity) and put back where they differ.
"""

from __future__ import annotations

import copy
import random
import sys
from argparse import Namespace
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flipproof._tensors import same_bits
from flipproof.errors import ModelError
from flipproof.spaces.packed_params import set_aside
from flipproof.spaces.quantised import every_tensor, is_wrapper

_GONE = object()
_version = attrgetter("_version")
_MOST = 200_000
"""How many objects are looked at: a model that holds more holds a data set or a trainer."""
LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "pandas", "flipproof"}
RECORDS = (SimpleNamespace, Namespace, UserDict, UserList)
"""Objects of the standard library that are only there to hold values."""
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type)


class Snapshot:
    """The state of a model: what its parameters, buffers and attributes are now.

    Watched are all tensors, dictionaries, lists, sets, arrays, random generators and plain objects that can be reached
    from the attributes of the model and its modules, and plain attributes of the classes that the user wrote. Not
    watched: global variables, closures, and objects of compiled extensions.

    Args:
        model: watched from now on.
        like: a copy of the model; where its tensors hold the same bits, they serve instead of a copy of our own.

    Raises:
        ModelError: naming an attribute that a forward uses up and that cannot be refilled, such as a generator.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)  # in train mode, so that a forward moves its running statistics
        >>> snapshot = Snapshot(norm)
        >>> _ = norm(torch.randn(8, 2))
        >>> snapshot.changed(), sorted(snapshot.restore())
        (True, ['num_batches_tracked', 'running_mean', 'running_var'])
        >>> norm.running_mean.tolist(), snapshot.changed()
        ([0.0, 0.0], False)
    """

    def __init__(self, model: nn.Module, like: nn.Module | None = None) -> None:
        self._model, self._bits = model, False
        self._tensors: list[_Kept] = []
        self._maps: list[tuple[str, dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[str, list[Any] | deque[Any], list[Any]]] = []
        self._others: list[_Other] = []
        self._refills: list[tuple[str, dict[Any, Any], Any, Any]] = []
        self.written: set[str] = set()
        """Names of everything that had to be put back so far."""
        self._seen: dict[int, Any] = {}
        self._names = {id(tensor): name for name, tensor in every_tensor(model).items()}
        self._copies = {} if like is None else every_tensor(like)
        pending: deque[tuple[str, Any]] = deque([("", model)])
        for kind in {type(module) for module in model.modules()}:
            pending.extend(self._keep_classes(kind))
        while pending:
            path, value = pending.popleft()
            pending.extend(self._keep(path, value))
            if len(self._seen) > _MOST:
                raise ModelError(
                    f"more than {_MOST:,} objects hang on the model, the last one at {path}: a data set or a trainer? "
                    f"What a forward writes there could not be put back. Take it off the model"
                )
        # batch normalisation writes its statistics without counting a version
        moving = {id(b) for m in model.modules() if isinstance(m, _NormBase) and m.training for b in m.buffers()}
        for kept in self._tensors:
            kept.silent |= id(kept.tensor) in moving
        self._seen = {}  # from here on every value is kept alive by what it was recorded with
        self._views = [*(mapping.values() for _, mapping, _ in self._maps), *(items for _, items, _ in self._lists)]
        self._look()

    def __reduce__(self) -> tuple[Callable[[nn.Module, bool], Snapshot], tuple[nn.Module, bool]]:
        """Addresses and versions mean nothing in another process: there, the copy that arrived is recorded anew."""
        return _recorded, (self._model, self._bits)

    def _look(self) -> None:
        """Note what `changed` compares: sizes and identities, gathered without a loop in Python."""
        self._counted = [kept.tensor for kept in self._tensors if not kept.silent]
        self._silent = [kept for kept in self._tensors if kept.silent]
        self._facts = self._read()

    def _read(self) -> tuple[list[int], ...]:
        return (
            list(map(_version, self._counted)),
            list(map(Tensor.data_ptr, self._counted)),
            list(map(len, self._views)),
            list(map(id, chain.from_iterable(self._views))),
        )

    def changed(self, *, bits: bool = True) -> bool:
        """Whether anything may differ from what was recorded.

        Args:
            bits: False asks version counters alone, also of tensors that are otherwise compared bit by bit.
        """
        return (
            self._read() != self._facts
            or bool(self._refills)
            or any(kept.differs() if bits else kept.counted() for kept in self._silent)
            or any(other.changed() for other in self._others)
        )

    def restore(self) -> list[str]:
        """Put back whatever differs, and return its names."""
        back = [kept.name for kept in self._tensors if kept.restore()]
        for path, mapping, before in self._maps:
            every = {**before, **mapping}
            differing = [key for key in every if before.get(key, _GONE) is not mapping.get(key, _GONE)]
            if differing:
                back += [_join(path, key) for key in differing]
                mapping.clear()
                mapping.update(before)
        for path, items, held in self._lists:
            if not _same_items(list(items), held):
                items.clear()
                items.extend(held)
                back.append(path)
        for other in self._others:
            if other.changed():
                other.write(other.before)
                back.append(other.name)
        for path, holder, key, spare in self._refills:
            holder[key] = copy.copy(spare)
            back.append(path)
        self.written.update(back)
        self._look()
        return back

    def verify(self) -> list[str]:
        """Compare every tensor bit by bit as well, put back what differs, and return what `restore` would have missed.

        Those are writes that no version counter sees, such as ``weight.data += …``. Such tensors are compared after
        every batch from then on.
        """
        self.restore()
        back: list[str] = []
        for kept in self._tensors:
            if kept.differs():
                kept.silent = True
                kept.restore()
                back.append(kept.name)
        self.written.update(back)
        self._look()
        return back

    def watch_bits(self) -> None:
        """From now on, compare every tensor bit by bit after every batch."""
        self._bits = True
        for kept in self._tensors:
            kept.silent = True
        self._look()

    def share(self, like: nn.Module) -> None:
        """Let the tensors of a copy of the model serve where they hold the bits that were recorded: less memory."""
        copies = every_tensor(like)
        for kept in self._tensors:
            kept.share(copies.get(kept.name))

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor that is watched, once, with one of its names."""
        return [(kept.name, kept.tensor) for kept in self._tensors]

    def _keep(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        """Record one value, and return what it holds."""
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return ()
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            held = getattr(value, "__dict__", None)
            if held:  # a wrapper's tensors, the quantisation state of a weight
                self._maps.append((path, held, dict(held)))
            inside = [(_join(path, key), part) for key, part in held.items()] if held else []
            if is_wrapper(value):
                return inside
            if not value.is_meta and value.layout == torch.strided:
                name = self._names.get(id(value), path)
                self._tensors.append(_Kept(name, value, self._copies.get(name)))
            return inside
        if isinstance(value, dict):
            self._maps.append((path, value, dict(value)))
            return [(_join(path, key), held) for key, held in value.items()]
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            if isinstance(value, (list, deque)):
                self._lists.append((path, value, list(value)))
            elif isinstance(value, set):
                self._others.append(_of_set(path, value))
            return [(f"{path}[{i}]", held) for i, held in enumerate(value)]
        if other := _of_array(path, value) or _of_generator(path, value):
            self._others.append(other)
            return ()
        if isinstance(value, partial):
            return [(path, value.args), (path, value.keywords)]
        if isinstance(value, MethodType):
            return [(path, value.__self__)]
        if not of_library(type(value)):
            return [*self._keep_classes(type(value)), *self._keep_object(path, value)]
        return self._keep_object(path, value) if isinstance(value, (nn.Module, *RECORDS)) else ()

    def _keep_object(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        """Record the attributes of an object, and return them."""
        held: list[tuple[str, Any]] = []
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            elsewhere = set_aside(value) if isinstance(value, nn.Module) else frozenset()
            if elsewhere:  # faults are put there by setting them, and taken out again by who does so
                self._others.append(_of_attributes(path, attributes, elsewhere))
            else:
                self._maps.append((path, attributes, dict(attributes)))
            for key, inside in attributes.items():
                inner = isinstance(value, nn.Module) and key in ("_parameters", "_buffers", "_modules")
                name = path if inner else _join(path, key)
                if _is_used_up(inside):
                    self._refills.append((name, attributes, key, _spare(name, inside)))
                else:
                    held.append((name, inside))
        slots = [slot for kind in type(value).__mro__ for slot in slots_of(kind)]
        if slots:
            self._others.append(_of_slots(path, value, slots))
            held += [(_join(path, slot), getattr(value, slot)) for slot in slots if hasattr(value, slot)]
        return held

    def _keep_classes(self, kind: type) -> list[tuple[str, Any]]:
        """Plain attributes of classes that the user wrote: ``type(self).calls += 1`` outlives a trial too."""
        held: list[tuple[str, Any]] = []
        for owner in kind.__mro__:
            if id(owner) in self._seen or of_library(owner):
                continue
            self._seen[id(owner)] = owner
            other = _of_class(owner)
            self._others.append(other)
            held += [(f"{owner.__qualname__}.{key}", value) for key, value in other.before.items()]
        return held


def _recorded(model: nn.Module, bits: bool) -> Snapshot:
    snapshot = Snapshot(model)
    if bits:
        snapshot.watch_bits()
    return snapshot


@dataclass(eq=False)
class _Kept:
    """One tensor and its values: those of another tensor, if they are the same bits, else a copy."""

    name: str
    tensor: Tensor
    like: InitVar[Tensor | None] = None

    def __post_init__(self, like: Tensor | None) -> None:
        self.home = self.tensor.data  # the same memory, whatever the tensor is made to refer to later
        held = self.tensor.detach()
        shared = like is not None and _same_bits(like.detach(), held)
        self.values = like.detach() if like is not None and shared else held.clone()
        self.silent = self.tensor.is_inference()  # such tensors count no versions
        self._look()

    def _look(self) -> None:
        self.version = 0 if self.tensor.is_inference() else self.tensor._version
        self.pointer = self.tensor.data_ptr()

    def share(self, other: Tensor | None) -> None:
        """Keep another tensor's values, if they are the same bits."""
        if other is not None and _same_bits(other.detach(), self.values):
            self.values = other.detach()

    def touched(self) -> bool:
        return self.silent or self.counted()

    def counted(self) -> bool:
        """Whether the tensor says itself that it was written to, or lies elsewhere."""
        version = 0 if self.tensor.is_inference() else self.tensor._version
        return version != self.version or self.tensor.data_ptr() != self.pointer

    def differs(self) -> bool:
        return not _same_bits(self.tensor.detach(), self.values)

    def restore(self) -> bool:
        """Put the values back if they differ; False if they did not."""
        if not self.touched():
            return False
        differs = self.differs()
        if self.tensor.data_ptr() != self.pointer or self.tensor.shape != self.home.shape:
            self.tensor.data = self.home
        if differs:
            self.home.copy_(self.values)
        self._look()
        return differs


@dataclass(eq=False)
class _Other:
    """A value that can change and is neither a tensor nor a dictionary."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    same: Callable[[Any, Any], bool]
    before: Any = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.read()

    def changed(self) -> bool:
        return not self.same(self.read(), self.before)


def _of_set(name: str, value: set[Any]) -> _Other:
    def refill(items: Any) -> None:
        value.clear()
        value.update(items)

    return _Other(name, lambda: frozenset(value), refill, lambda now, before: bool(now == before))


def _of_array(name: str, value: Any) -> _Other | None:
    if isinstance(value, (bytearray, array)):

        def refill(content: Any) -> None:
            value[:] = content

        return _Other(name, lambda: value[:], refill, lambda now, before: bool(now == before))
    if isinstance(value, np.ndarray):

        def copy_back(content: Any) -> None:
            value[...] = content

        return _Other(name, value.copy, copy_back, lambda now, before: bool(now.tobytes() == before.tobytes()))
    return None


def _of_generator(name: str, value: Any) -> _Other | None:
    if isinstance(value, torch.Generator):
        return _Other(name, value.get_state, lambda state: _ignore(value.set_state(state)), torch.equal)
    if isinstance(value, np.random.Generator):

        def set_state(state: Any) -> None:
            value.bit_generator.state = state

        return _Other(name, lambda: copy.deepcopy(value.bit_generator.state), set_state, _same_state)
    if isinstance(value, np.random.RandomState):
        return _Other(name, value.get_state, value.set_state, _same_state)
    if isinstance(value, random.Random):
        return _Other(name, value.getstate, value.setstate, lambda now, before: bool(now == before))
    return None


def _of_attributes(name: str, attributes: dict[str, Any], elsewhere: frozenset[str]) -> _Other:
    """Attributes but for some."""

    def read() -> dict[str, Any]:
        return {key: value for key, value in attributes.items() if key not in elsewhere}

    def write(before: dict[str, Any]) -> None:
        for key in read().keys() - before.keys():
            del attributes[key]
        attributes.update(before)

    return _Other(name, read, write, _same_values)


def _of_slots(name: str, value: Any, slots: list[str]) -> _Other:
    def read() -> list[Any]:
        return [getattr(value, slot, _GONE) for slot in slots]

    def write(items: list[Any]) -> None:
        for slot, before in zip(slots, items, strict=True):
            if before is not _GONE:
                setattr(value, slot, before)
            elif hasattr(value, slot):
                delattr(value, slot)

    return _Other(name, read, write, _same_items)


def _of_class(owner: type) -> _Other:
    def read() -> dict[str, Any]:
        return {
            k: v
            for k, v in vars(owner).items()
            if not k.startswith("__") and not callable(v) and not hasattr(type(v), "__get__")
        }

    def write(before: dict[str, Any]) -> None:
        for key in read().keys() - before.keys():
            delattr(owner, key)
        for key, value in before.items():
            setattr(owner, key, value)

    return _Other(owner.__qualname__, read, write, _same_values)


def _same_values(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[key] is before[key] for key in now)


def _ignore(_: object) -> None:
    """For setters that return something."""


def _same_items(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _same_state(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray):
        return bool(np.array_equal(now, before))
    if isinstance(now, Mapping):
        return now.keys() == before.keys() and all(_same_state(now[key], before[key]) for key in now)
    if isinstance(now, tuple):
        return len(now) == len(before) and all(map(_same_state, now, before))
    return bool(now == before)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.device != right.device or left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left, right) if left.is_quantized else same_bits(left, right)


def _is_used_up(value: Any) -> bool:
    """Whether it is an iterator: what is taken from it is gone."""
    return hasattr(type(value), "__next__") and not isinstance(value, nn.Module)


def _spare(name: str, value: Any) -> Any:
    try:
        return copy.copy(value)
    except TypeError as error:
        raise ModelError(
            f"{name} is a {type(value).__name__}: what a forward takes from it cannot be put back ({error}), so one "
            f"trial would change the next. Keep a list, or take it off the model"
        ) from None


def slots_of(kind: type) -> list[str]:
    """Attributes that a class keeps in slots."""
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def of_library(thing: Any, libraries: frozenset[str] = LIBRARIES) -> bool:
    """Whether a class or function was written in one of these packages."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] in libraries


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


class RandomState:
    """The global random numbers of torch, NumPy and Python, at the same place before every batch.

    A forward that draws (Monte Carlo dropout, added noise) then draws the same in the golden run and in every trial.
    Torch's generators are always pinned; NumPy's and Python's cost more and are pinned where the golden run uses them.

    Args:
        seed: of the campaign.
        device: where the model runs.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._torch = torch.Generator().manual_seed(seed % 2**63).get_state()
        self._cuda = torch.Generator(device).manual_seed(seed % 2**63).get_state() if self._device else self._torch
        self._numpy = np.random.RandomState(seed % 2**32).get_state()
        self._python = random.Random(seed).getstate()
        self._all = True
        self.drawn: set[str] = set()
        """Whose numbers the golden run has drawn."""

    def pin(self) -> None:
        """Set the generators."""
        torch.set_rng_state(self._torch)
        if self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        if self._all or "numpy" in self.drawn:
            np.random.set_state(self._numpy)  # noqa: NPY002  (the user's model draws from it)
        if self._all or "python" in self.drawn:
            random.setstate(self._python)

    def look(self) -> None:
        """Note who has drawn since `pin`."""
        if not torch.equal(torch.get_rng_state(), self._torch):
            self.drawn.add("torch")
        if self._device is not None and not torch.equal(torch.cuda.get_rng_state(self._device), self._cuda):
            self.drawn.add("torch")
        if not _same_state(np.random.get_state(), self._numpy):  # noqa: NPY002
            self.drawn.add("numpy")
        if random.getstate() != self._python:
            self.drawn.add("python")

    def settle(self) -> None:
        """The golden run is over: pin what it drew from."""
        self._all = False


class keep_random_state:
    """The user's global random generators are as before at the end."""

    def __enter__(self) -> None:
        self._torch = torch.get_rng_state()
        running = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if running else None
        self._numpy = np.random.get_state()  # noqa: NPY002
        self._python = random.getstate()

    def __exit__(self, *exception: object) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


class as_it_came:
    """The model's parameters, buffers and attributes are at the end what they were at the start.

    ``model.eval()`` may be more than a flag: adapters merge themselves into the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._random = keep_random_state()

    def __enter__(self) -> Snapshot:
        self._random.__enter__()
        self._came = Snapshot(self._model)
        return self._came

    def __exit__(self, *exception: object) -> None:
        self._came.verify()
        self._random.__exit__(*exception)
