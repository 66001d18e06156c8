"""Benchmarks: ratios measured in one run, medians, committed under `results/`."""
