"""Rounding once: from float64 to a float type with fewer than 24 significant bits."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, to nearest with ties to even, rounded once whatever the two types are.

    torch takes a float64 to float16, bfloat16 or an 8-bit float by way of float32 and rounds twice: 1 + 2⁻¹¹ + 2⁻⁴⁰
    lies above the middle of two float16 numbers, is that middle in float32, and then goes to the even one below. Here
    the first step rounds to odd: of the two float32 beside an inexact value it takes the one whose last bit is 1. With
    two bits or more to spare, the second step then rounds as if there had been no first (Boldo, Melquiond: Emulation
    of FMA and correctly rounded sums, IEEE TC 57(4), 2008).

    Example:
        >>> x = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
        >>> x.to(torch.float16).item(), cast(x, torch.float16).item()
        (1.0, 1.0009765625)
    """
    if x.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return x.to(dtype, copy=True)
    near = x.to(torch.float32)
    back = near.to(torch.float64)
    pattern = near.view(torch.int32)
    outward = torch.where(x.abs() > back.abs(), 1, -1).to(torch.int32)  # the neighbour on the other side of x
    even = (pattern & 1) == 0
    # infinite x are exact; NaN equals nothing, not even itself
    inexact = (back != x) & ~torch.isnan(x)
    odd = torch.where(inexact & even, pattern + outward, pattern)
    return odd.view(torch.float32).to(dtype)
