"""Fused experts, whose weights are parameters ``[experts, ...]``, as linear layers that can be adapted one by one."""

from typing import Any

import torch
from torch import Tensor, nn

from .linear import is_named

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# what transformers' experts interface says of them
DESCRIBED = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


class ExpertLinear(nn.Linear):
    """One expert's slice of a fused parameter, as an ``nn.Linear``. The parameter stays with the experts.

    Args:
        experts: the module that holds the parameter.
        parameter: its name; ``[experts, M, D]``, or ``[experts, D, M]`` if ``experts.is_transposed``.
        index: the expert.
    """

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make parameters
        self._experts = (experts,)  # in a tuple: it is no child
        self.parameter, self.index = parameter, index
        self.out_features, self.in_features = self.weight.shape
        self.training = experts.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``[M, D]``, a view."""
        return expert_weight(self._experts[0], self.parameter, self.index)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """``[M]``, a view."""
        return expert_bias(self._experts[0], self.parameter, self.index)

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module's; a new weight ``[M, D]`` is written into the fused parameter."""
        if name == "weight":
            with torch.no_grad():
                self.weight.copy_(value)
        else:
            super().__setattr__(name, value)


def expert_weight(experts: Any, parameter: str, index: int) -> Tensor:
    """The weight ``[M, D]`` of one expert."""
    weight: Tensor = getattr(experts, parameter)[index]
    return weight.T if experts.is_transposed else weight


def expert_bias(experts: Any, parameter: str, index: int) -> Tensor | None:
    """The bias ``[M]`` of one expert, if it has one."""
    return getattr(experts, f"{parameter}_bias")[index] if experts.has_bias else None


def find_experts(model: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """The fused parameters that `targets` name, by full name, with the modules that hold them; names as before PEFT.

    Raises:
        ValueError: a target that names no parameter.
        TypeError: a parameter that is no projection of fused experts, or of experts that cannot be run one by one.
    """
    found, unused = {}, set(targets)
    for owner, module in model.named_modules():
        for parameter, values in module.named_parameters(recurse=False):
            name = f"{owner}.{parameter}".replace(".base_layer.", ".").removeprefix(".")
            named = {target for target in targets if is_named(name, [target])}
            if named:
                _check(name, parameter, module, values)
                found[name] = module
                unused -= named
    if unused:
        names = (name for name, p in model.named_parameters() if p.dim() == 3)
        fused = sorted({".".join(name.rsplit(".", 2)[1:]) for name in names})
        raise ValueError(
            f"target_parameters {sorted(unused)} name no parameter of {type(model).__name__}; it has {fused or 'none'}"
        )
    return found


def _check(name: str, parameter: str, module: nn.Module, values: Tensor) -> None:
    """Raise unless `values` is a projection of experts that can be run one by one."""
    if values.dim() != 3 or parameter not in PROJECTIONS:
        raise TypeError(
            f"cannot adapt the parameter {name!r} {tuple(values.shape)}: target_parameters takes the projections of "
            f"fused experts, {PROJECTIONS} with the experts first. Name a linear layer in target_modules"
        )
    missing = [attribute for attribute in DESCRIBED if not hasattr(module, attribute)]
    if missing:
        raise TypeError(
            f"cannot adapt {name!r}: an encoder needs the inputs of each expert, so experts run one by one, by what "
            f"transformers' experts interface says of them; {type(module).__name__} has no {missing}. Use a version of "
            "transformers (5) in which it has, adapt linear layers by target_modules, or take PEFT's LoRA"
        )
    if not values.is_floating_point() or getattr(module, "_is_expert_parallel", False):
        why = f"they are {values.dtype}" if not values.is_floating_point() else "they are split over processes"
        raise TypeError(f"cannot adapt the experts {name!r}: {why}. Load the model in a floating-point dtype, unsplit")


def expert_sizes(experts: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every expert of these fused parameters, by the names of their layers."""
    found = {}
    for name, module in experts.items():
        parameter = name.rpartition(".")[2]
        one = ExpertLinear(module, parameter, 0)
        for index in range(len(getattr(module, parameter))):
            found[f"{name}.{index}"] = one.in_features, one.out_features
    return found
