"""Bounded activations, as modules."""
