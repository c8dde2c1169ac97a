"""Formats: how a value is stored as a word of bits."""

from flipproof.formats.affine import Affine
from flipproof.formats.base import Format, Stored
from flipproof.formats.clipped import BitClipped
from flipproof.formats.fixed import FixedPoint
from flipproof.formats.floating import BFloat16, Float8E4M3, Float8E5M2, Float16, Float32, Float64
from flipproof.formats.integer import Integer
from flipproof.formats.protected import Parity, TripleMSB
from flipproof.formats.secded import SECDED

__all__ = [
    "SECDED",
    "Affine",
    "BFloat16",
    "BitClipped",
    "FixedPoint",
    "Float8E4M3",
    "Float8E5M2",
    "Float16",
    "Float32",
    "Float64",
    "Format",
    "Integer",
    "Parity",
    "Stored",
    "TripleMSB",
]
