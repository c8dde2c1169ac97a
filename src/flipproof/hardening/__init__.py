"""Bounding what a network computes."""
