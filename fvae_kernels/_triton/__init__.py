"""The Triton kernels, a file for each op; `launchers` brings them to the raw operators."""
