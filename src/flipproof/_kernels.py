"""Compiled kernels: numba, with a cache on disk where there is a place for one.

A kernel is compiled when it is first called, which takes seconds, and kept beside its source or in the user's cache
folder. Where neither can be written (an installation that is read-only, an account without a home), it is compiled
anew in every process; `NUMBA_CACHE_DIR` names a folder that can be written instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with these options, cached if possible.

    Example:
        >>> @kernel(error_model="numpy")
        ... def double(x):
        ...     return 2 * x
        >>> double(4)
        8
    """

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as error:  # numba looks for a folder right here, and has no error of its own for "none"
            if "cannot cache function" not in str(error):
                raise
            return njit(**options)(function)

    return compiled
