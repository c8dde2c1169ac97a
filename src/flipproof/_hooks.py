"""Hooks on modules: for a while, and whether a model calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from flipproof.errors import ModelError


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


def check_hooks_run(model: nn.Module) -> None:
    """Refuse compiled modules where outputs of layers are looked at or changed.

    A compiled forward was traced with the hooks of that moment; one that is added later is not called, or makes it
    compile anew each time until it fails.

    Raises:
        ModelError: naming the first of them.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            place = f"{name} of the model" if name else "the model"
            raise ModelError(
                f"{place} is compiled, and compiled code does not call the hooks with which outputs of layers are hit: "
                f"pass the module that was given to torch.compile (its ._orig_mod)"
            )
