"""Hardening methods, one a file."""

from flipproof._literals import read_typed
from flipproof.hardening.methods.avc import AVC
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.methods.fence import Fence
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.ft_clipact import FTClipAct
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger

__all__ = ["AVC", "FTClipAct", "Fence", "FitAct", "Guard", "Hardening", "ProAct", "Ranger", "parse_hardening"]


def parse_hardening(text: str) -> Hardening:
    """A hardening from its repr.

    Raises:
        ConfigError: if it is none of those exported here.

    Example:
        >>> parse_hardening("Ranger(per='neuron')").per
        'neuron'
    """
    found: Hardening = read_typed(text, Hardening, map(globals().get, __all__), "Guard() or ProAct.quick()")
    return found
