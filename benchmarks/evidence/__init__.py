"""Evidence for the defaults: methods trained on small tasks under group shift, one JSON line a finished run.

    python -m benchmarks.evidence --tasks text --methods lora,held --seeds 0-9     # goes on where it was stopped
    python -m benchmarks.evidence.report                                           # paired differences, from the lines

tasks.py says what a task is, methods.py what a method is; a cell is a pair of the two, their settings, and a seed.
"""
