"""Hooks on modules, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(modules: Mapping[str, nn.Module], look: Callable[[str, nn.Module, Any], Any]) -> Iterator[None]:
    """While active, `look(name, module, result)` is called after each module; it may return another result.

    Args:
        modules: by the name that `look` gets.
        look: None lets the result be what it is.

    Example:
        >>> import torch
        >>> net, seen = nn.Linear(2, 3), []
        >>> with hooked({"net": net}, lambda name, module, result: seen.append((name, tuple(result.shape)))):
        ...     _ = net(torch.zeros(5, 2))
        >>> seen, len(net._forward_hooks)
        ([('net', (5, 3))], 0)
    """

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, args, result: look(name, module, result)

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
