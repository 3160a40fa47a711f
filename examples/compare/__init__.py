"""Evidence for the defaults: methods trained on small tasks under group shift, with one JSON line for each run.

    python -m examples.compare --tasks text --methods lora,held --seeds 0-9     # continues where it was stopped
    python -m examples.compare.report                                           # paired differences, from the lines

tasks.py defines tasks, methods.py methods. A cell is a task, a method, their settings, and a seed.
"""
