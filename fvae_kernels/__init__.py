"""FVAE-LoRA for PyTorch and PEFT. See README.md; the method on one page is `fvae_kernels.reference`."""

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

from . import diagnostics, interop, reference, tuning
from .config import FVAEConfig
from .diagnostics import collect_terms
from .nn.adapter import bound_noise
from .nn.explain import explain
from .nn.generate import generate_features
from .nn.linear import FusedFVAELinear, replace_linears
from .ops import divergence, encode, reconstruct
from .ops._backend import BackendUnavailable, available_backends, use_backend
from .serving.lora import export_as_lora
from .serving.plain import load_adapters, restore_linears, save_adapters
from .serving.ranks import suggest_ranks, trim
from .training import schedules
from .training.attach import attach_aux_loss
from .training.hooks import external_loss, token_mask
from .training.schedules import ObjectiveSchedule
from .training.trainer import FVAETrainerMixin, prepare_trainer

if TYPE_CHECKING or _find_spec("peft") is not None:
    from .peft import FVAELoraConfig, FVAELoraModel, export_for_inference
if TYPE_CHECKING:
    from .callbacks import FVAELoggingCallback, FVAEScheduleCallback


def __getattr__(name: str) -> Any:
    """Names that need PEFT or transformers, which may be missing; `import fvae_kernels` alone needs neither."""
    if name in ("FVAELoraConfig", "FVAELoraModel", "export_for_inference"):
        raise ImportError(f"fvae_kernels.{name} needs PEFT, which is not installed: pip install 'fvae_kernels[peft]'")
    if name in ("FVAELoggingCallback", "FVAEScheduleCallback"):
        if _find_spec("transformers") is None:
            raise ImportError(
                f"fvae_kernels.{name} needs transformers, which is not installed: pip install 'fvae_kernels[peft]'"
            )
        from . import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "FVAEConfig",
    "FVAELoggingCallback",
    "FVAELoraConfig",
    "FVAELoraModel",
    "FVAEScheduleCallback",
    "FVAETrainerMixin",
    "FusedFVAELinear",
    "ObjectiveSchedule",
    "attach_aux_loss",
    "available_backends",
    "bound_noise",
    "collect_terms",
    "diagnostics",
    "divergence",
    "encode",
    "explain",
    "export_as_lora",
    "export_for_inference",
    "external_loss",
    "generate_features",
    "interop",
    "load_adapters",
    "prepare_trainer",
    "reconstruct",
    "reference",
    "replace_linears",
    "restore_linears",
    "save_adapters",
    "schedules",
    "suggest_ranks",
    "token_mask",
    "trim",
    "tuning",
    "use_backend",
]
