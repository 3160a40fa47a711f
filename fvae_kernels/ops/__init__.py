"""The differentiable ops: `encode`, `divergence`, `reconstruct`."""

from .divergence import divergence
from .encode import encode
from .reconstruct import reconstruct

__all__ = ["divergence", "encode", "reconstruct"]
