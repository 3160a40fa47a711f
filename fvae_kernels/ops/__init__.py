"""The ops, one module each: checks, the autograd Function, the public function and its backends."""

from .divergence import divergence
from .encode import encode
from .geometry import geometry
from .layer import layer
from .reconstruct import reconstruct

__all__ = ["divergence", "encode", "geometry", "layer", "reconstruct"]
