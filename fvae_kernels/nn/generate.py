"""generate_features: the decoder as a generator of a layer's inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import mlp, posterior
from .adapter import FVAEAdapter
from .linear import check_input


@torch.no_grad()
def generate_features(
    layer: nn.Module,
    x: Tensor,
    other: Tensor | None = None,
    *,
    sample: bool = True,
    noise: bool = False,
    generator: torch.Generator | None = None,
    adapter_name: str | None = None,
) -> Tensor:
    """Inputs of an adapted layer as its decoder makes them: z_1 of `x`, and z_2 of `other` or of the prior.

    In PyTorch, with q_1, q_2, p_2 of the paper and the decoder's mean and scale t:

        z1 = q1(x).sample()
        z2 = q2(other).sample() if other is not None else p2.sample()
        x_hat = decoder(torch.cat((z1, z2), -1))  # Normal(x_hat, t).sample() with noise=True

    What z_2 holds can be seen by exchanging it: ``generate_features(layer, x, x[torch.randperm(len(x))])``. No dropout,
    in any mode, and no gradient. Source: paper, figure 1 and future work.

    Args:
        layer: a FusedFVAELinear, an adapted layer of PEFT's, or an FVAEAdapter.
        x: ``[..., D]``, inputs of the layer whose z_1 is taken.
        other: ``[..., D]`` of the shape of x, inputs whose z_2 is taken. None draws z_2 from p_2.
        sample: draw the latents. False takes the means of q_1, of q_2, and of p_2.
        noise: draw x from the decoder's Normal. False returns its mean.
        generator: of the random numbers, on x's device; None is torch's own.
        adapter_name: which adapter of a layer of PEFT's; None is the active one.

    Returns:
        ``[..., D]``, in the adapter's dtype.

    Raises:
        TypeError: a layer without adapter, or x no floating-point tensor.
        ValueError: shapes that do not fit, no such adapter, or an adapter that was exported for inference.
    """
    adapter = _adapter_of(layer, adapter_name)
    for name, given in (("x", x), ("other", x if other is None else other)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}; expected a tensor [..., {adapter.in_features}]")
    check_input(x, adapter.in_features)
    if other is not None:
        if other.shape != x.shape:
            raise ValueError(f"other has shape {tuple(other.shape)}; expected that of x, {tuple(x.shape)}")
        check_input(other, adapter.in_features)
    config, dtype = adapter.config, adapter.B.dtype

    def normal(size: int) -> Tensor:
        return torch.randn(*x.shape[:-1], size, dtype=dtype, device=x.device, generator=generator)

    def latent(i: int, given: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
        mean, _, z = posterior(given.to(dtype), adapter._encoder(i), normal(config.rank), bounds=bounds)
        return z if sample else mean

    z1 = latent(1, x, config.logvar1_bounds)
    if other is not None:
        z2 = latent(2, other)
    else:
        z2 = config.prior2_mean + config.prior2_std * (normal(config.rank) if sample else torch.zeros_like(z1))
    decoder = adapter._decoder()
    hidden = mlp(torch.cat((z1, z2), -1) if config.fusion == "concat" else (z1 + z2) / 2, decoder.hidden)
    x_hat = F.linear(hidden, decoder.w_out, decoder.b_out)
    return x_hat + decoder.scale.abs() * normal(adapter.in_features) if noise else x_hat


def _adapter_of(layer: Any, name: str | None) -> FVAEAdapter:
    adapters = getattr(layer, "fvae_adapter", None)
    if isinstance(layer, FVAEAdapter):
        found: Any = layer
    elif adapters is not None:
        active = [n for n in layer.active_adapters if n in adapters]
        name = name if name is not None or not active else active[0]
        if name not in adapters:
            raise ValueError(f"the layer has no FVAE-LoRA adapter {name!r}; its adapters are {sorted(adapters)}")
        found = adapters[name]
    else:
        found = getattr(layer, "adapter", None)
    if not isinstance(found, FVAEAdapter):
        raise TypeError(
            f"{type(layer).__name__} is no adapted layer: expected a FusedFVAELinear, an adapted layer of PEFT's, or "
            "an FVAEAdapter, for example model.get_submodule(name)"
        )
    if found.inference_only:
        raise ValueError(
            "this adapter was exported for inference: encoder 2 and the decoder, which generate, are not in it"
        )
    return found
