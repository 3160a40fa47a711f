"""The plug-in for stock PEFT; importing it registers the method."""

from ._register import register
from .config import METHOD, FVAELoraConfig
from .export import ExportReport, export_for_inference
from .layer import FVAELoraLayer, FVAELoraLinear
from .model import FVAELoraModel

register(METHOD, FVAELoraConfig, FVAELoraModel)

__all__ = [
    "ExportReport",
    "FVAELoraConfig",
    "FVAELoraLayer",
    "FVAELoraLinear",
    "FVAELoraModel",
    "export_for_inference",
]
