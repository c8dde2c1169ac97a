"""Analyses: what a model computes inside, with faults and without."""

from flipproof.analysis.propagation import Propagation, propagation

__all__ = ["Propagation", "propagation"]
