"""Methods compared on tasks, built in or of your own data, with one JSON line for each run (docs/compare.md).

    python -m examples.compare --data reviews.csv --model NAME --methods lora,fvae   # goes on where it was stopped
    python -m examples.compare --tasks text,images --methods all --search --jobs 2
    python -m examples.compare.report                                                # tables from the lines

tasks/ has the tasks, methods.py the methods, search.py what they are searched over. A cell is a task, a method, their
settings, and a seed; cells.py runs it, training.py trains, watch.py stops early, scoring.py scores.
"""
