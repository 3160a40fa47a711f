"""The authors' checkpoints in, ours out."""
