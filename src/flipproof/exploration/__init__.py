"""Exploration: which stored form of a network is small, accurate and survives, and the indicators that rank them."""

from flipproof.exploration.fortune import Exploration, explore
from flipproof.exploration.indicators import memory_bits, p_drop, rap

__all__ = ["Exploration", "explore", "memory_bits", "p_drop", "rap"]
