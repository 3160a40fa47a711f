"""explain: which implementation runs an adapted layer, and why."""

from collections.abc import Iterator

from torch import nn

from ..ops import _backend
from ..ops._host import compiled
from ..ops._layer_path import Path, path_of
from ..ops._raw import triton_part
from .adapter import FVAEAdapter


def explain(layer: nn.Module) -> str:
    """Say which path each adapter inside `layer` takes in training, and why; one line for each.

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
        path = path_of(adapter.config, dict(adapter.named_parameters()), device)
    except _backend.BackendUnavailable as error:
        yield f"training will raise BackendUnavailable: {error}"
        return
    yield from _told(path, device.type, named)
    yield "Inference runs s B mean_1 in plain PyTorch."


def _told(path: Path, device_type: str, named: str | None) -> Iterator[str]:
    if path.kind == "fused":
        yield f"training runs the fused kernels of {path.backend!r}, one forward and one backward."
        if path.backend == "triton":
            why = triton_part("layer.launch").why_general()
            yield f"Launches take Triton's own road: {why}." if why else "Launches go straight to the compiled kernels."
            if compiled() is None:
                yield "The C++ library is not built, so each step takes the host some 90 us longer."
    elif path.kind == "composed":
        yield f"training runs the smaller ops of {path.backend!r} (divergence, reconstruct), its encoders in plain"
        yield "PyTorch:"
        yield f"its fused kernel does not cover {path.missing}."
    else:
        yield "training runs the reference, plain PyTorch:"
        covered = path.missing is None
        yield _why_reference(device_type, named) if covered else f"{path.backend!r} does not cover {path.missing}."


def _why_reference(device_type: str, named: str | None) -> str:
    if named is not None:
        return "use_backend named it."
    preferred = _backend._PREFERRED.get(device_type)
    if preferred is None:
        return f"there are no kernels for {device_type} tensors."
    return f"{preferred!r} cannot run it here: {_backend._obstacle(preferred, 'layer', device_type)}."
