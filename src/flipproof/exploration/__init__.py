"""Exploration: which stored form of a network is small, accurate and survives, and the indicators that rank them."""

from flipproof.exploration.fortune import Exploration, explore
from flipproof.exploration.indicators import memory_bits, p_drop, rap
from flipproof.exploration.mixed import mixed_widths

__all__ = ["Exploration", "explore", "memory_bits", "mixed_widths", "p_drop", "rap"]
