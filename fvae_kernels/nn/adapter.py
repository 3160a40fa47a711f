"""FVAEAdapter: the parameters of one adapted layer, with its forward in training and at inference.

Every parameter is registered on this module itself, never on a child. PEFT strips the adapter's name from a key only if
it is the last or second to last part (``...fvae_adapter.<adapter>.<parameter>``). A nested layout would lose weights.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..config import FVAEConfig
from ..ops._backend import resolve
from ..ops._host import seed_like
from ..ops._layer_checks import check_layer
from ..ops._layer_path import path_of
from ..ops._layer_plan import LossGradient, Plan, PlannedTerms, Plans, make_plan, plannable, run_plan
from ..ops.layer import draw_noise, layer
from ..reference import LOGVAR_LIMIT, Decoder, Encoder, Linears, bounded, mlp, sample
from .parameters import is_served, parameter_order, parameter_shapes, start


class FVAEAdapter(nn.Module):
    """Encoders, decoder and B of one layer (paper, figure 1).

    Args:
        in_features: D, size of the layer's input.
        out_features: M, size of its output.
        config: an FVAEConfig.
        inference_only: hold only encoder 1's mean path and B; such an adapter cannot train.
    """

    B: Tensor
    encoder1_mean_weight: Tensor
    encoder1_logvar_weight: Tensor
    encoder1_logvar_bias: Tensor
    decoder_out_weight: Tensor
    decoder_out_bias: Tensor
    decoder_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: FVAEConfig,
        inference_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not inference_only:
            config.warn_if_unheld()
        self.in_features, self.out_features = in_features, out_features
        self.config, self.training_config, self.inference_only = config, config, inference_only
        self.alpha = config.alpha
        self.plans, self._order = Plans(), parameter_order(config)
        for name, shape in parameter_shapes(in_features, out_features, config):
            if inference_only and not is_served(name, config):
                continue
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        self.freeze_held()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start that the config names. In eval mode both starts equal the base layer.

        "authors": heads zero, B normal(0, 0.02). "lora": encoder 1's mean head as PEFT starts LoRA's A, B zero.
        The log-variance of z_1 starts at `logvar1_start` for every token, and the decoder's scale at one.
        """
        start(dict(self.named_parameters(recurse=False)), self.config)

    def requires_grad_(self, requires_grad: bool = True) -> "FVAEAdapter":
        """As in torch, except that the parameters of a held log-variance stay frozen."""
        super().requires_grad_(requires_grad)
        self.freeze_held()
        return self

    def freeze_held(self) -> None:
        """Freeze the parameters of z_1's log-variance if the config holds it: nothing depends on them."""
        if self.config.logvar1_held:
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("encoder1_logvar_"):
                    parameter.requires_grad_(False)

    def bound_noise(self, logvar: float | None) -> None:
        """Bound z_1's log-variance above by `logvar` in training from now on, for a warm-up of the noise.

        The smaller of this bound and the config's counts. No file holds the bound: a schedule sets it again.

        Args:
            logvar: the bound, in [-20, 20]; None leaves only the config's.

        Raises:
            ValueError: out of range, or the config holds the log-variance.
        """
        config = self.config
        if logvar is not None:
            if not -LOGVAR_LIMIT <= logvar <= LOGVAR_LIMIT:
                raise ValueError(f"logvar={logvar!r} is not allowed: expected a bound of at least -20 and at most 20")
            if config.logvar1_held:
                raise ValueError(
                    f"z_1's log-variance is held at {config.logvar1_start} (logvar1_held=True), so a bound has no "
                    "effect: set logvar1_held=False to warm up the noise"
                )
            high = min(logvar, config.logvar1_bounds[1])
            config = replace(config, logvar1_max=high, logvar1_start=min(config.logvar1_start, high))
        self.training_config = config

    def forward(
        self,
        x: Tensor,
        noise: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        base: Tensor | None = None,
        infer: bool = False,
    ) -> Any:
        """The training path: ``base + s B z_1`` for each token, and the terms of the objective.

        Args:
            x: ``[..., D]``.
            noise: two standard normal tensors ``[..., R]``; None draws them from torch's generator.
            mask: tokens ``[...]`` that enter the objective.
            base: the base layer's output ``[..., M]``; None is zero.
            infer: return `infer`'s output. accelerate's offloading needs the module itself to be called.

        Raises:
            RuntimeError: if this adapter was exported for inference.
        """
        if infer:
            return self.infer(x, base)
        if self.inference_only:
            raise RuntimeError(
                "this FVAE adapter was exported for inference: encoder 2 and the decoder, which training needs, are "
                "not in it. Call model.eval() to serve it, or load the full adapter to train it."
            )
        if noise is None and resolve("layer", x.device) != "triton":  # Triton kernels make noise by position
            noise = self.draw_noise(x), self.draw_noise(x)
        dropout = self.config.dropout if self.training else 0.0
        parameters = self._encoder(1), self._encoder(2), self._decoder(), self.B
        plain = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        backend = "reference" if plain else None  # torch.func differentiates PyTorch, not kernels
        return layer(x, *parameters, self.training_config, noise, dropout, mask, base=base, backend=backend)

    def planned(
        self, x: Tensor, base: Tensor, mask: Tensor | None, loss_gradient: LossGradient | None
    ) -> tuple[Tensor, PlannedTerms] | None:
        """`forward` by the plan of an earlier step or by a new one; None if no plan serves these inputs.

        Only the loss carries a graph, no other term. In backward `loss_gradient` is added to its gradient.
        """
        if self._is_watched():
            return None
        parameters: list[Tensor | None] = list(map(self._parameters.get, self._order))  # type: ignore[arg-type]
        dropout = self.config.dropout if self.training else 0.0
        plan = self.plans.fitting(parameters, x, self.training_config, dropout, mask, base)
        if plan is None:
            plan = self._new_plan(parameters, x, dropout, mask, base)
            if plan is None:
                return None
        noise = None if plan.backend == "triton" else (self.draw_noise(x), self.draw_noise(x))
        seed = seed_like(x) if dropout > 0 or noise is None else None
        return run_plan(plan, parameters, x, base, mask, noise, seed, loss_gradient)

    def _is_watched(self) -> bool:
        """Whether somebody wants to see or replace the module's own call, which a plan passes by."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return bool(hooks) or "forward" in self.__dict__ or _has_any_global_hook()

    def _new_plan(
        self, parameters: list[Tensor | None], x: Tensor, dropout: float, mask: Tensor | None, base: Tensor
    ) -> Plan | None:
        self.plans.forget()
        if parameters[-1] is None or self.inference_only or not plannable(parameters, x, base):
            return None  # a replica has no parameters of its own; `forward` refuses an adapter that cannot train
        config, networks = self.training_config, (self._encoder(1), self._encoder(2))
        tensors = check_layer(x, networks, self._decoder(), self.B, config, None, dropout, mask, base)
        path = path_of(config, tensors, x.device)
        if path.kind != "fused":
            return None
        plan = make_plan(parameters, config, dropout, path.backend)
        self.plans.keep(plan, x, dropout, base)
        return plan

    def set_scale(self, scale: float) -> None:
        """Scale the update by `scale`, relative to the scale that the adapter was made with."""
        alpha = self.alpha * scale
        self.config, self.training_config = (
            replace(self.config, alpha=alpha),
            replace(self.training_config, alpha=alpha),
        )

    def trained(self) -> bool:
        """True if any parameter is trained. DataParallel's replicas hold plain tensors, which count as trained."""
        for p in self._parameters.values():  # not any(): this runs in each step, and most often ends at the first
            if p is not None and p.requires_grad:
                return True
        return not self._parameters

    def draw_noise(self, x: Tensor) -> Tensor:
        """Standard normal ``[..., R]`` from torch's global generator, so manual_seed and recomputation repeat it."""
        return draw_noise(x, self.B)

    def infer(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """The inference path: ``base + s B mean_1``, or with a sample of z_1 if the config says so. No dropout.

        Args:
            x: ``[..., D]`` in the adapter's dtype.
            base: the base layer's output ``[..., M]``; the sum has its dtype. None is zero.
        """
        z, scaling = self._mean(1, x), self.config.scaling
        if self.config.sample_at_inference:
            h = mlp(x, self._hidden("encoder1_logvar" if self.config.separate_hidden else "encoder1"))
            logvar = F.linear(h, self.encoder1_logvar_weight, self.encoder1_logvar_bias)
            z = sample(z, bounded(logvar, *self.config.logvar1_bounds), self.draw_noise(x))
        B = self._get("B")
        if base is None:
            return scaling * F.linear(z, B)
        if not base.dtype == z.dtype == B.dtype:
            return base + (scaling * F.linear(z, B)).to(base.dtype)
        if base.dim() == 2:
            return torch.addmm(base, z, B.t(), alpha=scaling)  # one pass over the output instead of three
        tokens = torch.addmm(base.reshape(-1, B.shape[0]), z.reshape(-1, B.shape[1]), B.t(), alpha=scaling)
        return tokens.view(base.shape)

    def posterior_means(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean_1 and mean_2 ``[..., R]`` of the latents, without dropout: for diagnostics and plots."""
        return self._mean(1, x), self._mean(2, x)

    def delta_weight(self) -> Tensor:
        """``s B M_1 [M, D]``: the mean path of a linear encoder as a matrix, exact because it has no bias."""
        if not self.config.mergeable:
            why = (
                "sample_at_inference=True makes its output random"
                if self.config.sample_at_inference
                else f"encoder_hidden={self.config.encoder_hidden} makes the update a non-linear function of the input"
            )
            raise ValueError(
                f"cannot merge this FVAE adapter: {why}, so no weight matrix equals it. Train with encoder_hidden=() "
                "to be able to merge, or keep the adapter beside the base layer."
            )
        wide = self.B.float() if self.B.dtype in (torch.float16, torch.bfloat16) else self.B
        return self.config.scaling * (wide @ self.encoder1_mean_weight.to(wide.dtype))

    def _get(self, name: str) -> Tensor:
        """A parameter by name; in a replica (DataParallel, FSDP) it is a plain tensor, slower to find."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def _hidden(self, stem: str) -> Linears:
        sizes = self.config.decoder_hidden if stem == "decoder" else self.config.encoder_hidden
        return [
            (self._get(f"{stem}_hidden{i}_weight"), self._get(f"{stem}_hidden{i}_bias")) for i, _ in enumerate(sizes)
        ]

    def _mean_head(self, i: int) -> tuple[Tensor, Tensor | None]:
        biased = self.config.encoder_hidden or i == 2  # see parameter_shapes
        return self._get(f"encoder{i}_mean_weight"), self._get(f"encoder{i}_mean_bias") if biased else None

    def _mean(self, i: int, x: Tensor) -> Tensor:
        return F.linear(mlp(x, self._hidden(f"encoder{i}")), *self._mean_head(i))

    def _encoder(self, i: int) -> Encoder:
        stem = f"encoder{i}"
        return Encoder(
            self._hidden(stem),
            self._hidden(f"{stem}_logvar") if self.config.separate_hidden else None,
            *self._mean_head(i),
            self._get(f"{stem}_logvar_weight"),
            self._get(f"{stem}_logvar_bias"),
        )

    def _decoder(self) -> Decoder:
        return Decoder(self._hidden("decoder"), self.decoder_out_weight, self.decoder_out_bias, self.decoder_scale)

    def extra_repr(self) -> str:
        served = ", inference_only" if self.inference_only else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.config.rank}{served}"


def bound_noise(model: nn.Module, logvar: float | None) -> None:
    """`FVAEAdapter.bound_noise` for every adapter of `model`. Call it before a step to warm up the noise of z_1.

        for step in range(steps):
            fk.bound_noise(model, -8 + 8 * min(1, step / warm_up))  # standard deviation from 0.02 to 1

    Raises:
        ValueError: out of range, no adapter in the model, or one with a held log-variance. No bound has changed then.
    """
    adapters = [module for module in model.modules() if isinstance(module, FVAEAdapter)]
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no FVAE adapter whose noise could be bounded: adapt it first")
    before = [adapter.training_config for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.bound_noise(logvar)
    except ValueError:
        for adapter, config in zip(adapters, before, strict=True):
            adapter.training_config = config
        raise
