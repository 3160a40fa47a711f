"""``python3 -m benchmarks.gpu``: everything that needs a GPU, in one report (docs/gpu.md)."""
