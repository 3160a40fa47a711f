"""Triton kernels without a GPU: a stricter interpreter, a meter of memory accesses, and offline compilation."""
