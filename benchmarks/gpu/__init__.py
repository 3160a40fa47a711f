"""``python3 -m benchmarks.gpu``: everything that only a GPU can tell, in one report (docs/gpu.md)."""
