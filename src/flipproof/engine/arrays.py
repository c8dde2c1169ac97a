"""Arrays in JSON lines: bytes that a reader can bound before it makes anything of them."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
"""What an array in a file may consist of."""

LARGEST = 2**32
"""Bytes of one array in a file, at most."""


def array_to_json(values: NDArray[Any]) -> dict[str, Any]:
    """An array as a JSON object: dtype, shape, and its bytes, compressed.

    Example:
        >>> array_from_json(array_to_json(np.arange(6).reshape(2, 3))).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    if values.dtype.name not in DTYPES:
        raise TypeError(f"arrays of {values.dtype} are not written; expected one of {', '.join(DTYPES)}")
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    packed = base64.b64encode(zlib.compress(little.tobytes(), 1)).decode()
    return {"dtype": values.dtype.name, "shape": list(values.shape), "bytes": packed}


def array_from_json(value: Any) -> NDArray[Any]:
    """The inverse of `array_to_json`.

    Raises:
        ValueError: if dtype, shape or size are not what the bytes hold.
    """
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "bytes"}:
        raise ValueError("expected an array with dtype, shape and bytes")
    dtype, shape, packed = value["dtype"], value["shape"], value["bytes"]
    if dtype not in DTYPES or not isinstance(packed, str):
        raise ValueError(f"expected an array of {', '.join(DTYPES)}, got {dtype!r}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 8:
        raise ValueError(f"expected the shape of an array, got {str(shape)[:80]}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > LARGEST:
        raise ValueError(f"an array of {size:,} bytes is larger than {LARGEST:,}")
    try:
        inflate = zlib.decompressobj()
        content = inflate.decompress(base64.b64decode(packed, validate=True), size + 1)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"damaged bytes of an array ({error})") from None
    if len(content) != size or inflate.unconsumed_tail:
        raise ValueError(f"an array of shape {shape} and {dtype} takes {size:,} bytes, got {len(content):,}")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
