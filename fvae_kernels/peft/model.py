"""FVAELoraModel: puts the layers into a model, and the hooks that weigh their auxiliary loss."""

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn

from ..adapter import is_served, parameter_shapes
from ..config import FVAEConfig
from ..hooks import install_hooks, remove_hooks
from ..linear import linear_shape
from .config import FVAELoraConfig
from .files import Shapes, check_fits
from .layer import FVAELoraLayer, FVAELoraLinear

QUERY_VALUE, Q_V = ["query", "value"], ["q_proj", "v_proj"]
# Both generations of names: transformers 5 renamed the layers of several models.
TARGETS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), QUERY_VALUE),
    **dict.fromkeys(("vit", "dinov2", "deit", "beit"), [*QUERY_VALUE, *Q_V]),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), Q_V),
    **dict.fromkeys(("opt", "bart", "whisper", "wav2vec2", "hubert", "clip"), Q_V),
    "deberta-v2": ["query_proj", "value_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "t5": ["q", "v"],
}


class FVAELoraModel(BaseTuner):
    """The tuner behind `get_peft_model(model, FVAELoraConfig(...))`."""

    prefix: str = "fvae_"
    tuner_layer_cls = FVAELoraLayer
    target_module_mapping = TARGETS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model itself: older versions of PEFT call its `forward`, past the hooks that carry the loss."""
        return self.model(*args, **kwargs)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Every check that needs the model, before the first layer is replaced."""
        super()._prepare_model(peft_config, model)
        if peft_config.inference_only and not peft_config.inference_mode:
            raise ValueError(
                "this adapter was exported for inference and cannot be trained: encoder 2 and the decoder are not in it. "
                "Load it with is_trainable=False, or load the full adapter"
            )
        resolved = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        names = self._target_names(resolved, model)
        shapes: Shapes = {}
        for name in names:
            method = _layer_config(peft_config, name)
            D, M, _ = linear_shape(_base(model.get_submodule(name)))
            kept = parameter_shapes(D, M, method)
            shapes[name] = {n: s for n, s in kept if not peft_config.inference_only or is_served(n, method)}
        if names:
            peft_config.to_fvae_config().check_loss_weight_patterns(names)
        saved = peft_config.__dict__.pop("_saved_shapes", None)
        if saved is not None:
            check_fits(saved, shapes, model)

    def _target_names(self, peft_config: FVAELoraConfig, model: nn.Module) -> list[str]:
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
        return [name for name in names if self._check_target_module_exists(peft_config, name)]

    def _create_and_replace(
        self,
        peft_config: FVAELoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        method = _layer_config(peft_config, current_key)
        options = {
            "config": method,
            "loss_weight": method.loss_weight_for(current_key),
            "init_weights": peft_config.init_weights,
            "inference_only": peft_config.inference_only,
        }
        if isinstance(target, FVAELoraLayer):
            target.update_layer(adapter_name, **options)
            return
        linear_shape(_base(target))  # raises for a layer that cannot be adapted
        first = all(names <= {adapter_name} for names in map(_adapters, self._layers()))
        new_module = FVAELoraLinear(target, adapter_name, **options)
        # A new module starts in train mode, PEFT's convention for the first adapter. One that joins a model in eval mode
        # must not begin to sample.
        new_module.train(self.training if first else self.training and target.training)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, FVAELoraLayer)]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does, then hook the model."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        install_hooks(self.model)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers():
            for name in layer.active_adapters:
                if name in layer.fvae_adapter:
                    layer.get_delta_weight(name)  # raises, before any layer is touched

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(model)
        return model


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _adapters(layer: Any) -> set[str]:
    return set(layer.fvae_adapter.keys())


def _layer_config(config: FVAELoraConfig, name: str) -> FVAEConfig:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    return config.to_fvae_config(
        rank=ranks.get(get_pattern_key(list(ranks), name), config.r),
        alpha=alphas.get(get_pattern_key(list(alphas), name), config.alpha),
    )
