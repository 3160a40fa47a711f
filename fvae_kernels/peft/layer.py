"""FVAELoraLinear: a linear layer inside a PEFT model, with any number of FVAE-LoRA adapters."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..config import FVAEConfig
from ..nn.adapter import FVAEAdapter
from ..nn.linear import check_input, linear_shape, set_weight
from ..nn.quantised import refuse_merge
from ..training.aux_loss import AuxLossLayer


class FVAELoraLayer(BaseTunerLayer, AuxLossLayer):
    """What PEFT requires of an adapted layer: where parameters are, and how they are switched, merged, removed."""

    adapter_layer_names = ("fvae_adapter",)
    other_param_names = ("fvae_loss_weight",)
    in_features: int
    out_features: int
    fvae_adapter: nn.ModuleDict
    fvae_loss_weight: dict[str, float]

    def update_layer(
        self,
        adapter_name: str,
        config: FVAEConfig,
        loss_weight: float,
        init_weights: bool = True,
        inference_only: bool = False,
        inference_mode: bool = False,
    ) -> None:
        """Add the adapter called `adapter_name`, in this layer's mode."""
        adapter = FVAEAdapter(self.in_features, self.out_features, config, inference_only)
        if not init_weights:
            for name, parameter in adapter.named_parameters():
                if name != "decoder_scale":
                    nn.init.normal_(parameter, std=0.3 if name == "B" else 0.1)
        self.fvae_adapter[adapter_name] = adapter.train(self.training)
        self.fvae_loss_weight[adapter_name] = loss_weight
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def adapters(self) -> dict[str, Any]:
        """The layer's adapters by name."""
        return dict(self.fvae_adapter.items())

    def loss_weights(self) -> dict[str, float]:
        """The weight of each adapter's loss, by the adapter's name."""
        return dict(self.fvae_loss_weight)

    def set_loss_weights(self, weights: dict[str, float]) -> None:
        """Set the weights of these adapters; those that it does not have are left out."""
        self.fvae_loss_weight.update({name: w for name, w in weights.items() if name in self.fvae_loss_weight})

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; a log-variance that is held stays out of what it switches on."""
        super().set_adapter(*args, **kwargs)
        self._freeze_held()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; a log-variance that is held stays out of what it switches on."""
        super().set_requires_grad(*args, **kwargs)
        self._freeze_held()

    def _freeze_held(self) -> None:
        for adapter in self.fvae_adapter.values():
            adapter.freeze_held()  # type: ignore[operator]


class FVAELoraLinear(nn.Module, FVAELoraLayer):
    """``y = W x + b + sum over active adapters s B z_1``; see FusedFVAELinear for the layer without PEFT."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        self._init_aux_loss()
        self.base_layer = base_layer
        self.fvae_adapter, self.fvae_loss_weight = nn.ModuleDict(), {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features, self.fan_in_fan_out = linear_shape(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., D] -> [..., M]``, in the dtype of the base layer's output."""
        check_input(x, self.in_features)
        if self.disable_adapters and self.merged:
            self.unmerge()
        children: Any = self._modules  # nn.Module's own lookup of a child takes long
        y: Tensor = children["base_layer"](x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        adapters = children["fvae_adapter"]
        for name in self.active_adapters:
            if name not in adapters:
                continue
            adapter = adapters[name]
            if self.training and adapter.trained():
                y = self.train_call(adapter, x, y, self.fvae_loss_weight[name])
            else:
                y = self.infer_call(adapter, self._cast_input_dtype(x, adapter.B.dtype), y)
        return y

    def posterior_means(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean_1 and mean_2 ``[..., R]`` of the latents of x, of the active adapter."""
        adapter: Any = self.fvae_adapter[self.active_adapters[0]]
        return adapter.posterior_means(self._cast_input_dtype(x, adapter.B.dtype))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale one adapter's update, relative to its configured scale. Other adapters stay, as with LoRA."""
        if adapter in self.fvae_adapter:
            self._scale({adapter: scale})

    def scale_layer(self, scale: float) -> None:
        """Multiply the present updates of the active adapters by `scale`."""
        self._scale({name: self._scale_of(name) * scale for name in self._active()})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the updates of the active adapters by `scale`; None undoes all scaling."""
        self._scale({name: 1.0 if scale is None else self._scale_of(name) / scale for name in self._active()})

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.fvae_adapter]

    def _scale_of(self, name: str) -> float:
        adapter: Any = self.fvae_adapter[name]
        return adapter.config.alpha / adapter.alpha if adapter.alpha else 1.0

    def _scale(self, scales: dict[str, float]) -> None:
        merged = sorted(set(scales) & set(self.merged_adapters))
        if merged:
            raise RuntimeError(
                f"cannot scale {merged} while merged: unmerging would take out another update than was put in. Call "
                "unmerge() first"
            )
        for name, scale in scales.items():
            adapter: Any = self.fvae_adapter[name]
            adapter.set_scale(scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The matrix that equals a linear encoder's mean path, in the base weight's layout.

        Raises:
            ValueError: if the update depends on the input.
        """
        module: Any = self.fvae_adapter[adapter]
        delta = module.delta_weight()
        return (delta.T if self.fan_in_fan_out else delta).to(module.B.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight: all or none. Needs linear encoders and a base that is not quantised."""
        refuse_merge(self.get_base_layer())
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.fvae_adapter]
        deltas = {name: self.get_delta_weight(name) for name in names}
        weight: Any = self.get_base_layer().weight
        for name, delta in deltas.items():
            merged = weight + delta.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            set_weight(self.get_base_layer(), merged)
            weight = merged
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight (up to rounding, as for all methods in PEFT)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight: Any = self.get_base_layer().weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.fvae_adapter:
                weight = weight - self.get_delta_weight(name).to(weight.dtype)
        set_weight(self.get_base_layer(), weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True for a linear encoder: its mean path is LoRA."""
        module: Any = self.fvae_adapter[adapter_name]
        return module.config.mergeable

    def __repr__(self) -> str:
        return "fvae." + super().__repr__()
