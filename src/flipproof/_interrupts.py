"""Ctrl-C comes at any moment; what flipproof changes for a while is put back whole all the same.

Python runs the handler of a signal between two instructions, so a `KeyboardInterrupt` can arise at the entry of the
very function that puts a model back. Two things keep that from happening, in the main thread, which is the only one
that signals reach:

- `given_back` is around every public call that works on a model. Within it signals wait. They go through where `check`
  is called: before each forward pass, where an exception is cleaned up after like any other. A signal that finds
  another one still waiting after `PATIENCE` seconds goes through at once: something hangs, and the user insists.
- `whole` makes a context manager of a generator, as `contextlib.contextmanager` does, whose enter and exit are never
  cut short, for code of the user's own such as ``with space.corrupted(faults): …``.

Only handlers written in Python can raise an exception; a process that a signal ends takes its memory with it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # beneath `signal`, whose enums cost 30 µs a context
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import nn

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 2.0
"""Seconds after which a signal does not wait with one that waits already."""

SIGNALS = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)


class _Signals:
    """What the handlers were, whether signals wait, and which do."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.active = False
        self.held = False
        self.waiting: list[int] = []
        self.since = 0.0

    def install(self) -> bool:
        """Put our handler in the place of those written in Python; False if it is there already."""
        if self.active:
            return False
        try:
            for number in SIGNALS:
                found = _signal.getsignal(number)
                if callable(found) and found != self.handle:  # not SIG_DFL, SIG_IGN, or None for one written in C
                    self.handlers[number] = found
                    _signal.signal(number, self.handle)
        except BaseException:
            self.uninstall()
            raise
        self.active = True
        return True

    def uninstall(self) -> None:
        """Give the handlers back, unless somebody has put in another one."""
        self.active = False
        for number in reversed(SIGNALS):  # Ctrl-C last: from there on it goes where it always went
            before = self.handlers.get(number)
            if before is not None and _signal.getsignal(number) == self.handle:
                _signal.signal(number, before)

    def release(self) -> None:
        """Uninstall, and let through what waits."""
        try:
            self.uninstall()
        finally:
            waiting, self.waiting = self.waiting, []
        if waiting:
            self.handlers[waiting[0]](waiting[0], sys._getframe())

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Called by Python, in the main thread, between two instructions of `frame`."""
        if not self.held and not _changing(frame):
            self.deliver(number, frame)
            return
        now = time.monotonic()
        if self.waiting and now - self.since > PATIENCE:
            self.deliver(number, frame)
        elif not self.waiting:
            self.since = now
            self.waiting.append(number)

    def deliver(self, number: int, frame: FrameType | None) -> None:
        """Do what would have been done."""
        self.waiting = []
        self.handlers[number](number, frame)

    def forget(self) -> None:
        """In a child process: what waits is the parent's, and so is the model."""
        self.waiting = []
        self.held = False


_signals = _Signals()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_signals.forget)


def check() -> None:
    """Let a waiting signal through: call it where an exception does no harm, as often as the user wants to be heard."""
    if _signals.waiting and _in_main_thread():
        _signals.deliver(_signals.waiting[0], sys._getframe())


class _Whole(AbstractContextManager[T], Generic[T]):
    __slots__ = ("_generator", "_installed")

    def __init__(self, generator: Generator[T, None, None]) -> None:
        self._generator = generator
        self._installed = False

    def __enter__(self) -> T:
        if not _signals.active and _in_main_thread():
            self._installed = _signals.install()
        try:
            value = next(self._generator)
        except BaseException:
            self._end()
            raise
        if _signals.waiting and not _signals.held:
            try:
                check()
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if error is None:
                next(self._generator, None)
                return False
            try:
                self._generator.throw(error)
            except StopIteration as stop:
                return stop is not error
            except BaseException as other:
                if other is error or (isinstance(error, StopIteration) and other.__cause__ is error):
                    return False
                raise
            raise RuntimeError("the generator of a context did not stop")
        finally:
            self._end()

    def _end(self) -> None:
        if self._installed:
            self._installed = False
            _signals.release()
        elif _signals.waiting and not _signals.held:
            check()


def whole(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """As `contextlib.contextmanager`, but signals wait while the context is entered and left.

    Example:
        >>> @whole
        ... def appended(items, item):
        ...     items.append(item)
        ...     try:
        ...         yield len(items)
        ...     finally:
        ...         items.pop()
        >>> with appended([1, 2], 3) as length:
        ...     length
        3
    """

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> _Whole[T]:
        return _Whole(cast(Generator[T, None, None], function(*args, **kwargs)))

    return made


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class held(AbstractContextManager[None]):
    """Signals wait until the end, or for `check`: for what must not be done by halves.

    Example:
        >>> try:
        ...     with held():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done = True
        ... except KeyboardInterrupt:
        ...     print(done)
        True
    """

    def __init__(self) -> None:
        self._before = False
        self._installed = False
        self._main = _in_main_thread()

    def __enter__(self) -> None:
        if self._main:
            self._before = _signals.held
            self._installed = _signals.install()
            _signals.held = True

    def __exit__(self, *exception: object) -> None:
        if not self._main:
            return
        _signals.held = self._before
        if self._installed:
            _signals.release()
        elif _signals.waiting and not _signals.held:
            check()


class given_back(held):
    """While a public call works on a model: signals wait for `check`, and at the end the model is as it was.

    The steps within put back what they change, in the order in which they changed it. This is the last one, whatever
    became of them: training flags, `requires_grad`, hooks, gradient mode and the number of torch threads are compared
    with what they were, and set again where they differ.

    Args:
        model: any module.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> with given_back(net):
        ...     _ = net.eval().requires_grad_(False)
        >>> net.training, net.weight.requires_grad
        (True, True)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._training = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
        self._asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._hooks = [(hooks, set(hooks)) for module in model.modules() for hooks in _hooks_of(module)]
        self._gradients = torch.is_grad_enabled()
        self._threads = torch.get_num_threads()

    def __exit__(self, *exception: object) -> None:
        try:
            self._give_back()
        finally:
            super().__exit__()

    def _give_back(self) -> None:
        for module, training in self._training:
            if module.training is not training:
                module.training = training
        for parameter, asked in self._asked:
            if parameter.requires_grad is not asked:
                parameter.requires_grad_(asked)
        for hooks, before in self._hooks:
            for added in hooks.keys() - before:
                del hooks[added]
        if torch.is_grad_enabled() is not self._gradients:
            torch.set_grad_enabled(self._gradients)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)


def gives_back(function: Callable[P, T]) -> Callable[P, T]:
    """Makes `given_back` of a function's first argument, a model, last as long as its call."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):  # the function says what it takes
            return function(*args, **kwargs)
        with given_back(model):
            return function(*args, **kwargs)

    return called


def _hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    return [value for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)]


_CODES = frozenset(
    step.__code__ for step in (_Whole.__enter__, _Whole.__exit__, held.__enter__, held.__exit__, given_back.__exit__)
)


def _changing(frame: FrameType | None) -> bool:
    """Whether a context is being entered or left."""
    while frame is not None:
        if frame.f_code in _CODES:
            return True
        frame = frame.f_back
    return False
