"""Hooks on modules: whether a model calls them."""

from __future__ import annotations

from torch import nn

from flipproof.errors import ModelError


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
