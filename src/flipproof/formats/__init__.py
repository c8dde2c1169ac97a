"""Formats: how a value is stored as a word of bits."""

from flipproof._literals import read_typed
from flipproof.formats.affine import Affine
from flipproof.formats.base import Format, Stored
from flipproof.formats.bch import BCH
from flipproof.formats.cep import CEP
from flipproof.formats.clipped import BitClipped
from flipproof.formats.fixed import FixedPoint
from flipproof.formats.floating import BFloat16, Float, Float8E4M3, Float8E5M2, Float16, Float32, Float64
from flipproof.formats.in_place_ecc import InPlaceECC
from flipproof.formats.integer import Integer
from flipproof.formats.lsb_parity import LSBParity
from flipproof.formats.mset import MSET
from flipproof.formats.mx import MX
from flipproof.formats.protected import Parity, TripleMSB
from flipproof.formats.range_checked import RangeChecked
from flipproof.formats.rounded import Rounded
from flipproof.formats.secded import SECDED
from flipproof.formats.shared_scale import BlockFloat
from flipproof.formats.sign_vote import SignVote
from flipproof.formats.symmetric import Symmetric

__all__ = [
    "BCH",
    "CEP",
    "MSET",
    "MX",
    "SECDED",
    "Affine",
    "BFloat16",
    "BitClipped",
    "BlockFloat",
    "FixedPoint",
    "Float",
    "Float8E4M3",
    "Float8E5M2",
    "Float16",
    "Float32",
    "Float64",
    "Format",
    "InPlaceECC",
    "Integer",
    "LSBParity",
    "Parity",
    "RangeChecked",
    "Rounded",
    "SignVote",
    "Stored",
    "Symmetric",
    "TripleMSB",
    "parse_format",
]


def parse_format(text: str) -> Format:
    """A format from its repr.

    Raises:
        ConfigError: if it is none of those exported here.

    Example:
        >>> parse_format("SECDED(Affine(bits=4))"), parse_format("Float32")
        (SECDED(inner=Affine(bits=4, axis=None), block=None), Float32())
    """
    found: Format = read_typed(text, Format, map(globals().get, __all__), "Float32() or Affine(bits=4)")
    return found
