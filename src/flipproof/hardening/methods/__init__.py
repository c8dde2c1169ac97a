"""Hardening methods, one a file."""

from flipproof.hardening.methods.avc import AVC
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.ft_clipact import FTClipAct
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger

__all__ = ["AVC", "FTClipAct", "FitAct", "Guard", "Hardening", "ProAct", "Ranger"]
