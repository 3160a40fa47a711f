"""Diagnostics of a model's adapters: terms of the last step, and the geometry of the two latent spaces."""

import torch
from torch import Tensor, nn

from .nn.adapter import FVAEAdapter
from .ops import geometry
from .ops.divergence import check_posteriors
from .reference import LOGVAR_LIMIT, posterior, widen
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
    mean1, logvar1, _ = posterior(x, adapter._encoder(1), no_noise, bounds=adapter.config.logvar1_bounds)
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
    rows = kept(mean, mask)
    return int((rows.var(0, correction=0) > threshold).sum()) if rows.numel() else 0


def signal_to_noise(mean: Tensor, logvar: Tensor, mask: Tensor | None = None) -> float:
    """Variance of a latent's mean over tokens, over the variance of its noise: what a sample of it says of the token.

    Both are summed over entries. Below 1 the noise is the larger part of what differs from token to token.

    Args:
        mean: ``[..., R]``.
        logvar: ``[..., R]``, the log-variance that samples are drawn with.
        mask: tokens ``[...]`` that count.
    """
    mean, logvar = kept(mean, mask), kept(logvar, mask)
    noise = logvar.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT).exp().mean(0).sum()
    return float(mean.var(0, correction=0).sum() / noise) if len(mean) else 0.0


def effective_rank(mean: Tensor, B: Tensor, mask: Tensor | None = None) -> float:
    """Directions that the update ``B mean_1`` takes over tokens, as the participation ratio of their energies.

    With e_i the eigenvalues of ``sum over tokens of u u^T``, u the update of one token: ``(sum e_i)^2 / sum e_i^2``,
    which is 1 where all tokens are moved along one line, and at most R. 0 where there is no update.

    Args:
        mean: ``[..., R]``, mean_1, or what LoRA's A gives.
        B: ``[M, R]``.
        mask: tokens ``[...]`` that count.
    """
    energies = _energies(mean, B, mask)
    total, squares = energies.trace(), (energies * energies.T).sum()
    return 0.0 if squares == 0 else float(total.square() / squares)


def token_independent_share(mean: Tensor, B: Tensor, mask: Tensor | None = None) -> float:
    """Share of the update's energy that all tokens have alike: ``|mean of u|^2 / mean of |u|^2``; a bias has 1.

    Args:
        mean: ``[..., R]``, mean_1, or what LoRA's A gives.
        B: ``[M, R]``.
        mask: tokens ``[...]`` that count.
    """
    total = _energies(mean, B, mask).trace()
    alike = (widen(B).double() @ kept(mean, mask).double().mean(0)).square().sum()
    return 0.0 if total == 0 else float(alike / total)


def linear_probe(fit: Tensor, fit_targets: Tensor, test: Tensor, test_targets: Tensor, ridge: float = 1.0) -> float:
    """Accuracy on `test` of a ridge regression of the targets (one column a class) on `fit`; features standardised.

    Args:
        fit: ``[n, F]``, one row an example, as the means of a latent averaged over its tokens.
        fit_targets: ``[n]``, whole numbers: the label, or a spurious attribute.
        test: ``[m, F]``.
        test_targets: ``[m]``.
        ridge: penalty on the squared weights.
    """
    centre, scale = fit.double().mean(0), fit.double().std(0).clamp(min=1e-8)
    x, x_test = ((part.double() - centre) / scale for part in (fit, test))
    classes = torch.unique(torch.cat((fit_targets, test_targets)))
    y = (fit_targets.unsqueeze(1) == classes).double()
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean(0)))
    guess = classes[(x_test @ weights + y.mean(0)).argmax(1)]
    return float((guess == test_targets).double().mean())


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows ``[n, R]``, in float32 at least: all tokens, or those that `mask` keeps."""
    return widen(values.reshape(-1, values.shape[-1]) if mask is None else values[mask.bool()])


def _energies(mean: Tensor, B: Tensor, mask: Tensor | None) -> Tensor:
    """``[R, R]``, whose eigenvalues are those of the mean over tokens of ``u u^T`` with ``u = B mean``."""
    z, B = kept(mean, mask).double(), widen(B).double()
    return (z.T @ z) @ (B.T @ B) / max(len(z), 1)
