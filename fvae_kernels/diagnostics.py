"""Diagnostics of a model's adapters: terms of the last step, and the geometry of the two latent spaces."""

from torch import Tensor, nn

from .nn.adapter import FVAEAdapter
from .ops import geometry
from .ops.divergence import check_posteriors
from .reference import posterior
from .training.aux_loss import AuxLossLayer


def collect_terms(model: nn.Module) -> dict[str, dict[str, float]]:
    """loss, nll, kl and gamma (nats, means over tokens) of each adapted layer in its last training forward.

    Layers that have not run in training, or that ran inside torch.compile, are left out. The numbers are copied to the
    host, which waits for the device: call it when you log, not at every step.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AuxLossLayer)}
    return {
        name: {term: float(value) for term, value in layer.last_terms._asdict().items()}
        for name, layer in layers.items()
        if layer.last_terms is not None
    }


def posteriors(adapter: FVAEAdapter, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean_1, logvar_1, mean_2 and logvar_2 ``[..., R]`` of the latents of x ``[..., D]``, without dropout."""
    no_noise = x.new_zeros(())
    mean1, logvar1, _ = posterior(x, adapter._encoder(1), no_noise)
    mean2, logvar2, _ = posterior(x, adapter._encoder(2), no_noise)
    return mean1, logvar1, mean2, logvar2


def latent_geometry(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float = 1.5,
    prior2_std: float = 1.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Mismatch, discrepancy and distance of the two posteriors (paper, equation 5 and appendix B).

    `ops.geometry` by name. Its kernels have no backward: if an input requires grad, "reference" runs.

    Args:
        mean1: ``[..., R]``, like `logvar1`, `mean2` and `logvar2`.
        logvar1: log-variances of q_1.
        mean2: means of q_2.
        logvar2: log-variances of q_2.
        prior2_mean: mean of p_2.
        prior2_std: standard deviation of p_2.
        mask: ``[...]``, the tokens that count.
        backend: "triton", "cpp" or "reference"; None takes the fastest for the device of mean1.

    Returns:
        0-dim means over tokens, in nats: ``Lambda = KL(q_2 || p_1) - KL(q_2 || p_2)``,
        ``Delta = E_q2 log p_1 - E_q1 log p_1``, ``Gamma = Lambda + Delta``; and ``W2_squared``, the squared
        2-Wasserstein distance of q_1 and q_2. ``delta_bound`` is the paper's upper bound of |Delta|.

    Raises:
        TypeError: not floating point, or more than one dtype.
        ValueError: shapes do not fit, more than one device, or an invalid prior.
        BackendUnavailable: the named backend cannot run here, or is a kernel and an input requires grad.
    """
    check_posteriors("latent_geometry", mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask)
    mismatch, discrepancy, w2_squared, bound = geometry(
        mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask, backend=backend
    )
    return {
        "Lambda": mismatch,
        "Delta": discrepancy,
        "Gamma": mismatch + discrepancy,
        "W2_squared": w2_squared,
        "delta_bound": bound,
    }


def active_units(mean: Tensor, threshold: float = 1e-2, mask: Tensor | None = None) -> int:
    """Number of latent entries whose mean varies over tokens, with a variance above `threshold`.

    Args:
        mean: ``[..., R]``.
        threshold: variance above which an entry is active.
        mask: ``[...]``, the tokens that count.
    """
    rows = mean.reshape(-1, mean.shape[-1]) if mask is None else mean[mask.bool()]
    return int((rows.var(0, correction=0) > threshold).sum()) if rows.numel() else 0
