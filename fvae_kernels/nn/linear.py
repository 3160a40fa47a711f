"""FusedFVAELinear: an adapted nn.Linear that needs no PEFT."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FVAEConfig
from ..reference import Terms
from ..training.aux_loss import AuxLossLayer
from ..training.hooks import install_hooks
from .adapter import FVAEAdapter
from .quantised import is_hqq, refuse_merge, stored_weight


class FusedFVAELinear(nn.Module, AuxLossLayer):
    """A frozen linear layer with an FVAE-LoRA adapter beside it: ``y = W x + b + s B z_1``.

    Calling it returns only y. In training the gradient of ``loss_weight * terms.loss`` enters in the backward of y,
    with the weight that the training loop gives to the task loss (see `aux_loss`).

    Args:
        base_layer: an ``nn.Linear`` (may be quantised), transformers' ``Conv1D`` or an ``HQQLinear``; it is kept
            and frozen.
        config: an FVAEConfig.
        name: the layer's name in its model, if `loss_weight` is given by pattern.
        layers: number of adapted layers in the model, if `loss_weight` is None.
        dtype: of the adapter; by default the base's if that is float32 or float64, else float32.

    Raises:
        TypeError: for another kind of layer.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: FVAEConfig,
        name: str = "",
        layers: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init_aux_loss()
        self.in_features, self.out_features, self.transposed = linear_shape(base_layer)
        self.config, self.loss_weight = config, config.loss_weight_for(name, layers)
        weight = stored_weight(base_layer)
        if dtype is None:
            dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        self.base_layer = base_layer.requires_grad_(False)
        self.adapter = FVAEAdapter(self.in_features, self.out_features, config, device=weight.device, dtype=dtype)
        self._unmerged: tuple[nn.Parameter] | None = None  # the base weight before `merge`
        self._merge_again = False
        self.register_state_dict_post_hook(_save_unmerged)
        self.register_load_state_dict_pre_hook(_load_unmerged)
        self.register_load_state_dict_post_hook(_merge_again)

    @classmethod
    def from_linear(cls, linear: nn.Module, config: FVAEConfig, **kwargs: Any) -> "FusedFVAELinear":
        """An adapted layer around `linear`, in its mode (train or eval). In eval mode it first equals `linear`."""
        return cls(linear, config, **kwargs).train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that expects a linear layer."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., M]``, in the dtype of the base layer's output."""
        if self._unmerged is not None:
            return self._modules["base_layer"](x)  # type: ignore[misc]  # not self.base_layer, which takes longer to find
        check_input(x, self.in_features)
        y = self.base_layer(x)
        if self.training and self.adapter.trained():
            return self.train_call(self.adapter, x, y, self.loss_weight)
        return self.infer_call(self.adapter, x.to(self.adapter.B.dtype), y)

    def forward_with_terms(
        self, x: Tensor, noise: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Terms]:
        """y and the terms of the objective, differentiable. Nothing is injected: the caller adds ``terms.loss``.

        y uses z_1 in training or if `noise` is given, and mean_1 otherwise.

        Args:
            x: ``[..., D]``.
            noise: two standard normal tensors ``[..., R]``; None draws them from torch's generator.
            mask: tokens ``[...]`` that enter the terms.

        Returns:
            y ``[..., M]``, and ``Terms(loss, nll, kl, gamma)``: 0-dim, nats, means over tokens, with
            ``loss = recon_weight nll + kl_weight kl - gamma_weight gamma`` for the objective (4).
        """
        check_input(x, self.in_features)
        if self.merged:
            raise RuntimeError("the adapter is merged into the base layer: call unmerge() before asking for its terms")
        base, dtype = self.base_layer(x), self.adapter.B.dtype
        if noise is not None:
            noise = (noise[0].to(dtype), noise[1].to(dtype))
        y, terms = self.adapter(x, noise, mask, base)
        if not (self.training or noise is not None):
            y = self.adapter.infer(x.to(dtype), base)
        return y, terms

    @property
    def merged(self) -> bool:
        """True if the adapter is merged into the base weight."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add ``s B M_1`` to the base weight: exact for a linear encoder. `unmerge` restores it bit for bit.

        Raises:
            ValueError: if the update depends on the input (hidden layers in the encoder) or is random, or if the
                base layer is quantised.
            RuntimeError: if it is merged already.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already; unmerge() takes it out again")
        refuse_merge(self.base_layer)
        delta = self.adapter.delta_weight()
        weight: Any = self.base_layer.weight
        set_weight(self.base_layer, (weight.to(delta.dtype) + (delta.T if self.transposed else delta)).to(weight.dtype))
        self._unmerged = (weight,)  # in a tuple: else it would become a parameter of this module

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        if self._unmerged is None:
            raise RuntimeError("the adapter is not merged; there is nothing to take out")
        (weight,), merged = self._unmerged, self.weight
        if (weight.device, weight.dtype) == (merged.device, merged.dtype):
            self.base_layer.weight = weight  # the same object: another module may share it
        else:
            set_weight(self.base_layer, weight.to(merged))
        self._unmerged = None

    def adapters(self) -> dict[str, FVAEAdapter]:
        """The layer's only adapter, without a name."""
        return {"": self.adapter}

    def loss_weights(self) -> dict[str, float]:
        """The weight of its loss."""
        return {"": self.loss_weight}

    def set_loss_weights(self, weights: dict[str, float]) -> None:
        """Set the weight of its loss."""
        self.loss_weight = weights[""]

    def posterior_means(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean_1 and mean_2 ``[..., R]`` of the latents of x."""
        return self.adapter.posterior_means(x.to(self.adapter.B.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, loss_weight={self.loss_weight:g}"


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Replace the layer's weight, never in place: tied modules, for example embeddings, keep the old one."""
    layer.weight = nn.Parameter(weight.detach(), requires_grad=bool(layer.weight.requires_grad))


def _save_unmerged(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Save the base weight as before `merge`: beside the adapter, a merged one would count it twice."""
    if layer.merged and f"{prefix}base_layer.weight" in state:
        state[f"{prefix}base_layer.weight"] = layer._unmerged[0].detach()


def _load_unmerged(layer: Any, *_: Any) -> None:
    if layer.merged:
        layer.unmerge()
        layer._merge_again = True


def _merge_again(layer: Any, _: Any) -> None:
    if layer._merge_again:
        layer._merge_again = False
        layer.merge()


def check_input(x: Tensor, in_features: int) -> None:
    """Raise unless x fits a layer with `in_features` inputs.

    Raises:
        TypeError: not floating point.
        ValueError: another last dimension.
    """
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point tensor of shape [..., {in_features}]")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {in_features}], the layer's in_features last")


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2), a linear layer that stores its weight as ``[D, M]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """True if `linear_shape` accepts the module."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_hqq(module)


def is_attention(module: nn.Module) -> bool:
    """True for the out_proj of nn.MultiheadAttention, which reads its weight and never calls it."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def linear_shape(module: nn.Module) -> tuple[int, int, bool]:
    """in_features, out_features, and True if the weight is stored transposed.

    Raises:
        TypeError: for a module that is not linear.
    """
    if isinstance(module, nn.Linear) or is_hqq(module):
        return module.in_features, module.out_features, False  # type: ignore[return-value]
    if is_conv1d(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0], weight.shape[1], True
    raise TypeError(
        f"cannot adapt {type(module).__name__}: expected torch.nn.Linear, transformers' Conv1D or HQQLinear. "
        "Point target_modules at the linear layers inside it."
    )


def replace_linears(
    model: nn.Module, config: FVAEConfig, target_modules: str | Iterable[str] = "all-linear", freeze: bool = True
) -> list[str]:
    """Replace every linear layer of `model` that `target_modules` names by a FusedFVAELinear, in place.

    Args:
        model: any module. If it returns a loss, that becomes the total loss (6) in training.
        config: an FVAEConfig.
        target_modules: ends of module names ("query", "layer.0.attention.query"), a regular expression for whole names,
            or "all-linear" (all but the output embeddings).
        freeze: freeze all other parameters too. Train a new head again with ``head.requires_grad_(True)``.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: if a target matches no linear layer, or a pattern of loss_weight does not fit the layers. The model
            is unchanged then.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    named = dict(model.named_modules(remove_duplicate=False))
    names = find_linears(model, named, targets)
    config.check_loss_weight_patterns(names)
    if freeze:
        model.requires_grad_(False)
    layers = len({id(named[name]) for name in names})
    wrappers: dict[int, FusedFVAELinear] = {}  # a layer used in two places stays one layer
    for name in names:
        old = named[name]
        if id(old) not in wrappers:
            wrappers[id(old)] = FusedFVAELinear.from_linear(old, config, name=name, layers=layers)
        parent, _, child = name.rpartition(".")
        setattr(named[parent], child, wrappers[id(old)])
    install_hooks(model)
    return names


def find_linears(model: nn.Module, named: dict[str, nn.Module], targets: str | list[str]) -> list[str]:
    """Names of the linear layers that `targets` selects; a ValueError lists the layers that exist."""
    linears = [n for n, m in named.items() if n and is_linear(m) and not is_attention(m)]
    linears = [n for n in linears if not any(isinstance(named[p], FusedFVAELinear) for p in _parents(n))]
    if targets == "all-linear":
        embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        found = [n for n in linears if named[n] is not embeddings]
        missing = [] if found else ["all-linear"]
    else:
        found = [n for n in linears if is_named(n, targets)]
        if isinstance(targets, str):
            missing = [] if found else [targets]
        else:
            missing = [target for target in targets if not any(is_named(n, [target]) for n in found)]
    if missing:
        ends = sorted({n.rpartition(".")[2] for n in linears})
        raise ValueError(f"target_modules {missing} match no linear layer of {type(model).__name__}; it has {ends}")
    return found


def is_named(name: str, targets: str | Iterable[str]) -> bool:
    """True if a module's name is, or ends with, one of `targets`; or matches it, if it is a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
