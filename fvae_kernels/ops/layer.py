"""The adapted layer as one op. FusedFVAELinear and the PEFT layer call it in training.

    y, terms = layer(x, ..., base=W x + b)          y = base + s B z_1, written once

Every objective is linear in a dozen means over tokens: one, nll, and for both posteriors the sums of mean^2, (mean -
mu)^2, var, logvar and of the squared sample. A table of weights, `Objective`, defines it. In backward
the table turns the gradients of the terms into one small vector of coefficients.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config import FVAEConfig
from ._checks import rows, token_flags
from ._host import draw_seed
from ._layer_checks import check_layer
from ._layer_composed import composed
from ._layer_inputs import Arriving, Needs, Options, Tensors
from ._layer_path import autocast_products, path_of
from ._once import differentiable_once
from ._raw import RAW


class LayerFunction(torch.autograd.Function):
    """(base [..., M], options, detach_target, backend, *`Tensors.flat`) -> y, terms

    y is [..., M], and the terms are loss, nll, kl and gamma. Tensors are reshaped to tokens [N] in here. Results are no
    views: autograd adds gradients of x in place only if the tensor owns its memory.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Tensor | None, options: Options, detach_target: bool, backend: str, *entries: Tensor | None
    ) -> tuple[Tensor, ...]:
        tensors = Tensors.of(entries)
        y, terms, state = RAW[backend].layer_fwd(_rows(base), *tensors.rows(), *options)
        ctx.save_for_backward(state, *entries)
        ctx.options, ctx.detach_target, ctx.backend = options, detach_target, backend
        ctx.set_materialize_grads(False)
        return _shaped(y, tensors.x), *terms.unbind()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_y: Tensor | None, *grad_terms: Tensor | None) -> tuple[Tensor | None, ...]:
        state, *entries = ctx.saved_tensors
        tensors = Tensors.of(entries)
        need_base, _, _, _, need_x, *_ = ctx.needs_input_grad
        flags, hidden = ctx.needs_input_grad[-len(tensors.parameters) :], ctx.options.encoder_hidden
        arriving = Arriving(_rows(grad_y), *grad_terms)
        needs = Needs.of(need_x, flags, hidden, arriving)
        grad_x, computed = RAW[ctx.backend].layer_bwd(
            *arriving, *tensors.rows(), *ctx.options, state, ctx.detach_target, needs
        )
        made = needs.flags(flags, hidden)
        grads = (grad if flag else None for flag, grad in zip(made, computed, strict=True))
        grad_x = _shaped(grad_x, tensors.x) if needs.x else None
        return grad_y if need_base else None, None, None, None, grad_x, *(None,) * 4, *grads


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else rows(t)


def _shaped(t: Tensor, x: Tensor) -> Tensor:
    """t [N, M] as [..., M] with the tokens of x, not as a view."""
    return torch.ops.aten._unsafe_view(t, (*x.shape[:-1], t.shape[-1]))


def layer(
    x: Tensor,
    encoder1: reference.Encoder,
    encoder2: reference.Encoder,
    decoder: reference.Decoder,
    B: Tensor,
    config: FVAEConfig,
    noise: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    *,
    base: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, reference.Terms]:
    """Low-rank update and objective of one adapted layer, equations (4) and (6) of the paper.

    Equivalent to ``base + delta`` with ``delta, terms = reference.layer(...)``, which is the definition. With dropout
    a kernel draws one seed from torch's generator and drops by position: other activations than the reference drops,
    with the same probability up to 2^-17. Under autocast the Triton kernels round the factors of products of
    float32 parameters to its dtype; the C++ kernels do not.

    Args:
        x: input ``[..., D]`` in the parameters' dtype, or in half precision if that is float32.
        encoder1: parameters of q(z_1 | x).
        encoder2: parameters of q(z_2 | x).
        decoder: parameters of p(x | z_1, z_2).
        B: ``[M, R]``.
        config: objective, weights, priors and scale.
        noise: two standard normal tensors ``[..., R]`` of the parameters' dtype. None draws them from torch's
            generator; the Triton kernels draw a seed from it, and noise by position from the seed.
        dropout: probability of dropping a hidden activation; 0 outside training.
        mask: tokens ``[...]`` that enter the objective; None is all of them.
        base: the base layer's output ``[..., M]``, of any floating dtype; None is zero.
        backend: run on this backend or raise; None picks one.

    Returns:
        ``base + s B z_1 [..., M]`` in the dtype of `base`, and ``Terms`` (nats, means over tokens).

    Raises:
        TypeError: noise of another dtype than the parameters.
        ValueError: shapes do not fit, tensors are on several devices, or dropout is outside [0, 1).
        BackendUnavailable: `backend` was named and cannot run, or does not cover these options.
    """
    tensors = check_layer(x, (encoder1, encoder2), decoder, B, config, noise, dropout, mask, base)
    path = path_of(config, tensors, x.device, backend, noise or ())
    if noise is None and (path.kind != "fused" or path.backend != "triton"):  # Triton kernels make noise by position
        noise = draw_noise(x, B), draw_noise(x, B)
    if path.kind != "fused":
        assert noise is not None
        arguments = x.to(B.dtype), encoder1, encoder2, decoder, B, config, noise, dropout, mask
        delta, terms = composed(*arguments, path.backend) if path.kind == "composed" else reference.layer(*arguments)
        return delta if base is None else base + delta.to(base.dtype), terms
    seed = draw_seed(x.device) if dropout > 0 or noise is None else None
    parameters, (noise1, noise2) = flat_parameters(encoder1, encoder2, decoder, B), noise or (None, None)
    entries = Tensors(x, parameters, noise1, noise2, token_flags(mask), seed).flat()
    options = Options.of(config, dropout, autocast_products(B, path.backend))
    y, *terms = LayerFunction.apply(base, options, config.detach_target, path.backend, *entries)
    return y, reference.Terms(*terms)


def flat_parameters(
    encoder1: reference.Encoder, encoder2: reference.Encoder, decoder: reference.Decoder, B: Tensor
) -> list[Tensor | None]:
    """The parameters in the order of `Networks.flat`."""
    encoders = [*_flat(encoder1.hidden), *encoder1[2:], *_flat(encoder2.hidden), *encoder2[2:]]
    return [*encoders, *_flat(decoder.hidden), *decoder[1:], B]


def _flat(layers: reference.Linears) -> list[Tensor | None]:
    return [t for weight_and_bias in layers for t in weight_and_bias]


def draw_noise(x: Tensor, B: Tensor) -> Tensor:
    """Standard normal ``[..., R]`` for the tokens of x, from torch's generator."""
    return torch.randn(*x.shape[:-1], B.shape[1], dtype=B.dtype, device=x.device)
