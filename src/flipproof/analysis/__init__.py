"""Analyses: what a model computes inside, with faults and without."""

from flipproof.analysis.bits import bit_criticality, bit_profile, clip_bits, clip_tensors
from flipproof.analysis.deepvigor import DeepVigor, analyze
from flipproof.analysis.factors import estimate_factors
from flipproof.analysis.propagation import Propagation, propagation
from flipproof.analysis.protection import protection
from flipproof.analysis.selection import protected_formats, select
from flipproof.analysis.vulnerability import VulnerabilityMap

__all__ = [
    "DeepVigor",
    "Propagation",
    "VulnerabilityMap",
    "analyze",
    "bit_criticality",
    "bit_profile",
    "clip_bits",
    "clip_tensors",
    "estimate_factors",
    "propagation",
    "protected_formats",
    "protection",
    "select",
]
