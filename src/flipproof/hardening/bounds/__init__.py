"""Bounded activations, as modules: every kind that is exported here can be saved and loaded."""

from flipproof.hardening.bounds.bounded import Bounded, ClampInput, Saturate, Smooth, ZeroAbove

__all__ = ["Bounded", "ClampInput", "Saturate", "Smooth", "ZeroAbove"]
