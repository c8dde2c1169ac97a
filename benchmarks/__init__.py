"""How fast flipproof is, as ratios measured in one run. `python -m benchmarks` runs everything; see README.md."""
