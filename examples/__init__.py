"""Runnable examples; `python -m examples.demo --help` is the place to start."""
