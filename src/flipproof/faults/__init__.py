"""Fault spaces, fault models and injection."""

from flipproof.faults.models import BitErrorRate, BitPosition, FaultModel, Faults, RandomBits, StuckAt, Upsets
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.sites import Parameters, Site
from flipproof.faults.space import FaultSpace

__all__ = [
    "BitErrorRate",
    "BitPosition",
    "FaultModel",
    "FaultSpace",
    "Faults",
    "Parameters",
    "RandomBits",
    "Site",
    "StuckAt",
    "TrialGenerator",
    "Upsets",
]
