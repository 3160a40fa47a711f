"""The adapted layer as one op: what FusedFVAELinear and the PEFT layer call in training.

    y, terms = layer(x, ..., base=W x + b)          y = base + s B z_1, written once

Every objective is linear in a dozen means over tokens: one, nll, and for both posteriors the sums of mean^2, (mean -
mu)^2, var, logvar and of the squared sample. A table of weights defines it, and gives backward one small vector of
coefficients for whatever arrives at y, loss, nll, kl and gamma.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config import FVAEConfig
from . import _backend
from ._backend import BackendUnavailable, resolve
from ._checks import rows, token_flags
from ._layer_composed import composed
from ._layer_support import autocast_products, check_layer, composable, objective_table, uncovered
from ._once import differentiable_once
from ._raw import RAW

FIXED = 15  # arguments of LayerFunction.forward before the parameters


class LayerFunction(torch.autograd.Function):
    """(base [..., M], x [..., D], noise1, noise2 [..., R], mask bool [N], seed, options, parameters) -> y, terms

    y is [..., M], and the terms are loss, nll, kl and gamma. The parameters are those of encoder1, encoder2
    (`encoder_size` each), decoder, then scale and B. Tensors become [N, D] in here, and results no views: autograd adds
    another gradient of x to ours in place only where it holds all of its memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor | None,
        x: Tensor,
        noise1: Tensor | None,
        noise2: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        dropout: float,
        average: bool,
        scaling: float,
        prior2_mean: float,
        table: tuple[float, ...],
        products: torch.dtype | None,
        detach_target: bool,
        encoder_size: int,
        backend: str,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tensors = _grouped(encoder_size, parameters)
        options = (dropout, average, scaling, prior2_mean, table, products)
        inputs = _rows(x), *tensors, _rows(noise1), _rows(noise2), mask, seed, *options
        y, *terms, state = RAW[backend].layer_fwd(_rows(base), *inputs)
        ctx.save_for_backward(x, noise1, noise2, mask, seed, state, *parameters)
        ctx.options, ctx.detach_target, ctx.encoder_size, ctx.backend = options, detach_target, encoder_size, backend
        ctx.set_materialize_grads(False)
        return _shaped(y, x), *terms

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, noise1, noise2, mask, seed, state, *parameters = ctx.saved_tensors
        grad_y, grad_loss, grad_nll, *_ = grads
        through_decoder = grad_loss is not None or grad_nll is not None
        need_base, need_x = ctx.needs_input_grad[:2]
        asked, encoders = ctx.needs_input_grad[FIXED:], 2 * ctx.encoder_size
        asked = [
            *asked[:encoders],
            *(need and through_decoder for need in asked[encoders:-1]),  # the decoder's and its scale
            asked[-1] and grad_y is not None,  # B
        ]
        needs = [need_x, any(asked[:encoders]), any(asked[encoders:-2]), *asked[-2:]]
        tensors = _grouped(ctx.encoder_size, parameters)
        inputs = _rows(x), *tensors, _rows(noise1), _rows(noise2), mask, seed, *ctx.options
        grad_x, computed = RAW[ctx.backend].layer_bwd(
            _rows(grad_y), *grads[1:], *inputs, state, ctx.detach_target, needs
        )
        grad_parameters = (grad if need else None for need, grad in zip(asked, computed, strict=True))
        grad_base = grad_y if need_base else None
        return grad_base, _shaped(grad_x, x) if need_x else None, *(None,) * (FIXED - 2), *grad_parameters


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else rows(t)


def _shaped(t: Tensor, x: Tensor) -> Tensor:
    """[N, M] as [..., M] with the tokens of x, and no view."""
    return torch.ops.aten._unsafe_view(t, (*x.shape[:-1], t.shape[-1]))


def _grouped(encoder_size: int, parameters: Any) -> tuple[Any, ...]:
    """encoder1, encoder2, decoder, scale, B, as the raw ops take them."""
    first, second = encoder_size, 2 * encoder_size
    return list(parameters[:first]), list(parameters[first:second]), list(parameters[second:-2]), *parameters[-2:]


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
    a kernel draws one seed from torch's generator and drops by position, so it drops other activations than the
    reference, with the same probability up to 2^-17. Under autocast the Triton kernels round the factors of products of
    float32 parameters to its dtype; the C++ kernels do not.

    Args:
        x: input ``[..., D]``, of the parameters' dtype or, where that is float32, of half precision.
        encoder1: parameters of q(z_1 | x).
        encoder2: parameters of q(z_2 | x).
        decoder: parameters of p(x | z_1, z_2).
        B: ``[M, R]``.
        config: objective, weights, priors and scale.
        noise: two standard normal tensors ``[..., R]`` of the parameters' dtype; drawn by torch's generator where it is
            None, and in the Triton kernels by position from a seed of it.
        dropout: probability of dropping a hidden activation; 0 outside training.
        mask: tokens ``[...]`` that enter the objective; all of them where it is None.
        base: the adapted layer's own output ``[..., M]``, of any floating dtype; zero where it is None.
        backend: run on this one or raise; None picks.

    Returns:
        ``base + s B z_1 [..., M]`` in the dtype of `base`, and ``Terms`` (nats, means over tokens).

    Raises:
        TypeError: noise of another dtype than the parameters.
        ValueError: shapes do not fit, more than one device, or dropout outside of [0, 1).
        BackendUnavailable: `backend` was named and cannot run, or does not cover these options.
    """
    tensors = check_layer(x, (encoder1, encoder2), decoder, B, config, noise, dropout, mask, base)
    named = _backend._selected if backend is None else backend
    backend = resolve("layer", x.device, backend)
    missing = None if backend == "reference" else uncovered(config, tensors, noise or (), backend)
    if missing is not None and named is not None:
        raise BackendUnavailable(
            f"backend {named!r} was asked for to run layer, but cannot: its kernel does not cover {missing}; leave "
            "the backend unnamed to run what there is, or name 'reference' to run plain PyTorch."
        )
    if noise is None and (backend != "triton" or missing is not None):
        noise = draw_noise(x, B), draw_noise(x, B)
    if backend == "reference" or missing is not None:
        assert noise is not None
        arguments = x.to(B.dtype), encoder1, encoder2, decoder, B, config, noise, dropout, mask
        smaller_ops = backend != "reference" and composable(tensors)
        delta, terms = composed(*arguments, backend) if smaller_ops else reference.layer(*arguments)
        return delta if base is None else base + delta.to(base.dtype), terms
    parameters = [*_flat(encoder1.hidden), *encoder1[2:], *_flat(encoder2.hidden), *encoder2[2:]]
    size = len(parameters) // 2
    y, *terms = LayerFunction.apply(
        base,
        x,
        *(noise or (None, None)),
        token_flags(mask),
        _draw_seed(x.device) if dropout > 0 or noise is None else None,
        float(dropout),
        config.fusion == "average",
        float(config.scaling),
        float(config.prior2_mean),
        objective_table(config),
        autocast_products(B, backend),
        config.detach_target,
        size,
        backend,
        *parameters,
        *_flat(decoder.hidden),
        *decoder[1:],
        B,
    )
    return y, reference.Terms(*terms)


def _flat(layers: reference.Linears) -> list[Tensor | None]:
    return [t for weight_and_bias in layers for t in weight_and_bias]


def draw_noise(x: Tensor, B: Tensor) -> Tensor:
    """Standard normal ``[..., R]`` for the tokens of x, from torch's generator."""
    return torch.randn(*x.shape[:-1], B.shape[1], dtype=B.dtype, device=x.device)


def _draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator; it stays on the device, where the kernels read it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
