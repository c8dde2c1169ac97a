"""Tracing by one thread, while others call modules as ever.

While `torch.fx` traces, every call of every module in the process goes to its tracer, from whatever thread. Another
thread's forward would then fail or come to be part of the graph, and two traces at once would undo each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_one_at_a_time = threading.RLock()
if hasattr(os, "register_at_fork"):  # a thread that held it is not there in the child

    def _free() -> None:
        global _one_at_a_time
        _one_at_a_time = threading.RLock()

    os.register_at_fork(after_in_child=_free)


class Tracer(fx.Tracer):
    """Traces what its own thread calls; keeps buffers symbolic, so that what a forward makes of one is made again."""

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module; waits for traces of other threads."""
        with _one_at_a_time:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a module that is called gives: a step of the graph, or its outputs if another thread calls it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What an attribute of a module is: a stand-in, or its value if another thread reads it."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
