"""Quantised base layers. They are told by the name of their package, which need not be installed."""

from torch import Tensor, nn

PACKAGES = {"bitsandbytes", "torchao"}  # they put their weights into an nn.Linear


def is_hqq(module: nn.Module) -> bool:
    """True for HQQ's linear layer, which is no nn.Linear and has no `weight`."""
    return type(module).__name__ == "HQQLinear" and hasattr(module, "W_q")


def stored_weight(module: nn.Module) -> Tensor:
    """The tensor that holds the layer's weight, quantised or not."""
    return module.W_q if is_hqq(module) else module.weight  # type: ignore[return-value]


def is_quantised(module: nn.Module) -> bool:
    """True if the weight is quantised: by bitsandbytes, torchao or HQQ, or stored as integers."""
    weight = stored_weight(module)
    package = type(weight).__module__.partition(".")[0]
    return is_hqq(module) or package in PACKAGES or not weight.is_floating_point()


def refuse_merge(module: nn.Module) -> None:
    """Raise if an update cannot be merged into the layer's weight.

    Raises:
        ValueError: its weight is quantised.
    """
    if is_quantised(module):
        raise ValueError(
            f"cannot merge into a quantised layer ({type(module).__name__} with a weight of type "
            f"{type(stored_weight(module)).__name__}): the update would be rounded away. Keep the adapter beside it, "
            "or load it on the base model in float32 or bfloat16 and merge there."
        )
