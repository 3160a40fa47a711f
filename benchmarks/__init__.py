"""Benchmarks: ``pytest benchmarks/ --benchmark-only`` times every side; ``make bench`` times the sides in turns."""
