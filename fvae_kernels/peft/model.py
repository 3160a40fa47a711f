"""FVAELoraModel: puts the layers into a model, and the hooks for their auxiliary loss."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..nn.experts import expert_sizes, find_experts
from ..nn.linear import is_attention, linear_shape
from ..nn.parameters import is_served, parameter_shapes
from ..nn.quantised import refuse_merge
from ..serving.saved import Beside, Shapes, check_complete, check_fits
from ..training.hooks import install_hooks, remove_hooks
from .experts import UnfusedExperts, unfused
from .layer import FVAELoraLayer, FVAELoraLinear
from .patterns import OF_PEFT, layer_config, warn_unmatched
from .weighted import check_weighted, weighted_config, weighted_factors

QUERY_VALUE, Q_V = ["query", "value"], ["q_proj", "v_proj"]
BOTH = [*QUERY_VALUE, *Q_V]
# Old and new names: transformers 5 renamed the layers of several models.
TARGETS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), QUERY_VALUE),
    **dict.fromkeys(("vit", "dinov2", "deit", "beit"), BOTH),
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
    _experts: tuple[str, ...] = ()  # what names inside of unfused experts begin with

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model itself. Older versions of PEFT call its `forward`, which would bypass the hooks."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """As LoRA's: a model without default targets needs no target_modules if target_parameters are given."""
        if peft_config.target_parameters and model_config.get("model_type") not in self.target_module_mapping:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Run every check that needs the model, before the first layer is replaced."""
        super()._prepare_model(peft_config, model)
        if peft_config.inference_only and not peft_config.inference_mode:
            raise ValueError(
                "this adapter was exported for inference and cannot be trained: encoder 2 and the decoder are not in "
                "it. Load it with is_trainable=False, or load the full adapter"
            )
        self._experts = _prefixes(model, UnfusedExperts)
        resolved = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        sizes = {name: _shape(name, model) for name in self._target_names(resolved, model)}
        sizes.update(expert_sizes(find_experts(model, sorted(peft_config.target_parameters or ()))))
        shapes: Shapes = {}
        for name, (D, M) in sizes.items():
            method = layer_config(peft_config, name)
            kept = parameter_shapes(D, M, method)
            shapes[name] = {n: s for n, s in kept if not peft_config.inference_only or is_served(n, method)}
        self._count, self._first = len(sizes), not any(map(_adapters, self._layers()))
        if sizes:
            peft_config.to_fvae_config().check_loss_weight_patterns(sizes)
            warn_unmatched(peft_config, sizes)
        saved = peft_config.__dict__.pop("_saved", None)
        if saved is None:
            return
        if saved.found:
            beside = Beside(tuple(peft_config.modules_to_save or ()), peft_config.bias, peft_config.token_counts())
            if not getattr(model, "_checkpoint_conversion_mapping", None):  # PEFT renames the keys of such a model
                check_fits(saved, shapes, beside, model)
        elif peft_config.inference_mode:  # a config without weights can start a training, but cannot serve
            raise ValueError(f"{saved.folder} has a config and no adapter_model.safetensors: no adapter to load")

    def _check_target_module_exists(self, config: Any, key: str) -> Any:  # type: ignore[override]
        """As PEFT's; the layers of unfused experts are no targets."""
        return not key.startswith(self._experts) and super()._check_target_module_exists(config, key)

    def _target_names(self, peft_config: Any, model: nn.Module) -> list[str]:
        inside = _prefixes(model, BaseTunerLayer)
        names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
        return [name for name in names if self._check_target_module_exists(peft_config, name)]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            layers = unfused(parent, target_name, target).unfuse(parameter_name)
            for index, layer in enumerate(layers):
                self._create_and_replace(peft_config, adapter_name, layer, str(index), layers, f"{current_key}.{index}")
            return
        method = layer_config(peft_config, current_key)
        options: dict[str, Any] = {
            "config": method,
            "loss_weight": method.loss_weight_for(current_key, self._count),
            "init_weights": peft_config.init_weights,
            "inference_only": peft_config.inference_only,
        }
        if isinstance(target, FVAELoraLayer):
            target.update_layer(adapter_name, **options)
            return
        linear_shape(_base(target))  # raises for a layer that cannot be adapted
        new_module = FVAELoraLinear(target, adapter_name, **options)
        # A new module starts in train mode, PEFT's convention for the first adapter. One added to a model in eval
        # mode must not begin to sample.
        new_module.train(self.training if self._first else self.training and target.training)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, FVAELoraLayer)]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does, then put hooks on the model. If anything fails, the model stays unchanged."""
        undo = _Undo(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", OF_PEFT, RuntimeWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            undo(adapter_name)
            if not any(adapter_name in layer.fvae_adapter for layer in self._layers()):
                self.peft_config.pop(adapter_name, None)
            raise
        install_hooks(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would ignore it and use the active adapter for every sample
            raise ValueError(
                "adapter_names is not supported: FVAE-LoRA cannot mix adapters in one batch, use set_adapter"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Refuse incomplete adapters. PEFT would load what fits and only report the rest."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_complete(remapped, model.state_dict(), adapter_name)
        return remapped

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add the adapter ``sum_i weights_i s_i B_i M_i`` of adapters with linear encoders, as LoRA's method does.

        The new adapter serves and cannot be trained: encoders 2 and decoders cannot be added up. It is not active;
        `set_adapter` makes it so.

        Args:
            adapters: names of adapters of this model.
            weights: one number each, negative ones too.
            adapter_name: name of the new adapter.
            combination_type: "cat" is exact, and its rank in a layer is the sum of the ranks there; "svd" is the best
                matrix of a given rank. LoRA's other types have no meaning here.
            svd_rank: rank for "svd"; None is the largest of the adapters.

        Raises:
            ValueError: an adapter that is not there, has hidden layers or samples; a name that is taken; another
                combination; trained biases, modules_to_save or trained tokens, which no sum has. The model is unchanged
                then.
        """
        check_weighted(self, adapters, weights, adapter_name, combination_type, svd_rank)
        factors = weighted_factors(self, adapters, weights, combination_type, svd_rank)
        self.peft_config[adapter_name] = weighted_config(self, adapters[0], factors)
        self.inject_adapter(self.model, adapter_name)
        for name, (A, B) in factors.items():
            adapter: Any = self.model.get_submodule(name).fvae_adapter[adapter_name]
            adapter.encoder1_mean_weight.copy_(A)
            adapter.B.copy_(B)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge as PEFT does. If an adapter is not a matrix, raise before any layer is touched.

        Raises:
            ValueError: for hidden layers in the encoder, a sampled output, or a quantised base layer.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        remove_hooks(model)
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        """As PEFT's, which copies a layer's weight into itself when it unloads, and fails if the layer has none."""
        if new_module is getattr(child, "base_layer", None):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            for name in adapter_names or layer.active_adapters:
                if name not in layer.fvae_adapter:
                    continue
                if not layer.fvae_adapter[name].config.mergeable:
                    layer.get_delta_weight(name)  # raises
                refuse_merge(layer.get_base_layer())


class _Undo:
    """A record of a model's structure, modes and trained parameters, to restore them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(module, dict(module._modules), module.training) for module in model.modules()]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def __call__(self, adapter_name: str) -> None:
        for module, children, training in self.modules:
            module.training = training
            module._modules.clear()
            module._modules.update(children)
            if isinstance(module, FVAELoraLayer) and adapter_name not in module.fvae_adapter:
                module.fvae_loss_weight.pop(adapter_name, None)
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)
        if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            for mark in ("peft_config", "_hf_peft_config_loaded"):  # transformers sets the latter before it tries
                self.model.__dict__.pop(mark, None)


def _prefixes(model: nn.Module, kind: type) -> tuple[str, ...]:
    """What the names of all modules inside of modules of this kind begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kind))


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _shape(name: str, model: nn.Module) -> tuple[int, int]:
    module = _base(model.get_submodule(name))
    if is_attention(module):
        raise TypeError(
            f"cannot adapt {name!r}: nn.MultiheadAttention reads its weight and never calls it, so an adapter would "
            f"have no effect. Leave it out, with exclude_modules=[{name.rpartition('.')[2]!r}]"
        )
    return linear_shape(module)[:2]


def _adapters(layer: Any) -> set[str]:
    return set(layer.fvae_adapter.keys())
