"""Fault-injection campaigns: many trials, recorded."""
