"""explain: which implementation an adapted layer runs on, and why."""

from collections.abc import Iterator

from torch import nn

from ..ops import _backend
from ..ops._layer_support import composable, uncovered
from .adapter import FVAEAdapter


def explain(layer: nn.Module) -> str:
    """Say which path the adapters inside `layer` take in training, and why; one line for each.

    Args:
        layer: a FusedFVAELinear, a layer of PEFT's, or a whole model.

    Raises:
        ValueError: there is no adapter inside.
    """
    adapters = [(name, module) for name, module in layer.named_modules() if isinstance(module, FVAEAdapter)]
    if not adapters:
        raise ValueError(
            f"{type(layer).__name__} holds no FVAE adapter; expected a FusedFVAELinear, an adapted layer of PEFT's, or "
            "a model with such layers"
        )
    return "\n".join(f"{name}: {' '.join(_reasons(adapter))}" for name, adapter in adapters)


def _reasons(adapter: FVAEAdapter) -> Iterator[str]:
    if adapter.inference_only:
        yield "inference only, in plain PyTorch; it was exported without what training needs."
        return
    device, named = adapter.B.device, _backend._selected
    try:
        backend = _backend.resolve("layer", device)
    except _backend.BackendUnavailable as error:
        yield f"training will raise BackendUnavailable: {error}"
        return
    missing = uncovered(adapter.config, dict(adapter.named_parameters()), backend=backend)
    if backend != "reference" and missing is None:
        yield f"training runs the fused kernels of {backend!r}, one forward and one backward."
    elif backend != "reference" and named is not None:
        yield f"training will raise BackendUnavailable: {backend!r} was named and does not cover {missing}."
    elif backend != "reference" and composable(dict(adapter.named_parameters())):
        yield f"training runs the smaller ops of {backend!r} (divergence, reconstruct), its encoders in plain PyTorch:"
        yield f"its fused kernel does not cover {missing}."
    else:
        yield "training runs the reference, plain PyTorch:"
        yield f"{backend!r} does not cover {missing}." if backend != "reference" else _why_reference(device.type, named)
    yield "Inference runs s B mean_1 in plain PyTorch."


def _why_reference(device_type: str, named: str | None) -> str:
    if named is not None:
        return "use_backend named it."
    preferred = _backend._PREFERRED.get(device_type)
    if preferred is None:
        return f"there are no kernels for {device_type} tensors."
    return f"{preferred!r} cannot run it here: {_backend._obstacle(preferred, 'layer', device_type)}."
