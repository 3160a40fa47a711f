"""Argument checks of the public functions. Errors say what came, what was expected and what to do."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """All tensors have the floating dtype and the device of the first one. None is skipped."""
    (first, yardstick), *others = ((name, t) for name, t in tensors.items() if t is not None)
    if not isinstance(yardstick, Tensor):
        raise TypeError(f"{op}: {first} is {type(yardstick).__name__}; expected a tensor")
    if yardstick.dtype not in DTYPES:
        raise TypeError(f"{op}: {first} is {yardstick.dtype}; expected a float dtype, convert it with {first}.float()")
    for name, t in others:
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")
        if t.dtype != yardstick.dtype:
            raise TypeError(
                f"{op}: {name} is {t.dtype} but {first} is {yardstick.dtype}; expected one dtype for all, "
                f"convert it with {name}.to({first}.dtype)"
            )
        if t.device != yardstick.device:
            raise ValueError(
                f"{op}: {name} is on {t.device} but {first} is on {yardstick.device}; expected one device for all, "
                f"move it with {name}.to({first}.device)"
            )


def check_shape(op: str, name: str, t: Tensor | None, expected: tuple[int, ...], why: str) -> None:
    """None is an optional argument that was left out, and passes."""
    if t is not None and t.shape != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {tuple(expected)}, {why}")


def check_features(op: str, name: str, t: Tensor) -> None:
    if t.dim() == 0:
        raise ValueError(f"{op}: {name} is 0-dim; expected [..., features], with at least one dimension")


def check_weight(op: str, name: str, w: Tensor, features: int, of: str) -> None:
    """A weight [out, features], as in torch.nn.Linear."""
    if w.dim() != 2 or w.shape[1] != features:
        raise ValueError(
            f"{op}: {name} has shape {tuple(w.shape)}; expected [out, {features}], where {features} is the last "
            f"dimension of {of}, as the weight of torch.nn.Linear"
        )


def check_mask(op: str, mask: Tensor | None, tokens: torch.Size, device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask is {type(mask).__name__}; expected a tensor, bool or of zeros and ones, or None")
    check_shape(op, "mask", mask, tuple(tokens), "one entry for each token")
    if mask.device != device:
        raise ValueError(f"{op}: mask is on {mask.device}; expected {device}, move it with mask.to({str(device)!r})")


def rows(t: Tensor) -> Tensor:
    """[..., D] as [N, D]."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def token_flags(mask: Tensor | None) -> Tensor | None:
    """[...] as bool [N]."""
    return None if mask is None else mask.reshape(-1).bool()
