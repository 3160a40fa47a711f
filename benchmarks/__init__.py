"""Benchmarks: ``pytest benchmarks/ --benchmark-only`` times every side, ``make bench`` compares them in turns."""
