"""Hardening: bounded activations, ways to choose their bounds, and what they cost."""

from flipproof.hardening.avc import AVC
from flipproof.hardening.base import Hardening, harden
from flipproof.hardening.bounded import Bounded, ClampInput, Saturate, Smooth, ZeroAbove
from flipproof.hardening.fitact import FitAct
from flipproof.hardening.ft_clipact import FTClipAct
from flipproof.hardening.guard import Guard, GuardedLinear
from flipproof.hardening.overhead import Overhead, overhead
from flipproof.hardening.proact import ProAct
from flipproof.hardening.ranger import Ranger
from flipproof.hardening.report import HardeningReport, hardening_report
from flipproof.hardening.saving import load_hardened, save_hardened
from flipproof.hardening.scrubbing import scrub_

__all__ = [
    "AVC",
    "Bounded",
    "ClampInput",
    "FTClipAct",
    "FitAct",
    "Guard",
    "GuardedLinear",
    "Hardening",
    "HardeningReport",
    "Overhead",
    "ProAct",
    "Ranger",
    "Saturate",
    "Smooth",
    "ZeroAbove",
    "harden",
    "hardening_report",
    "load_hardened",
    "overhead",
    "save_hardened",
    "scrub_",
]
