"""geometry: how far the two posteriors are from the priors and from each other (paper, equation 5 and appendix B).

    Lambda = 1/2 sum( mean2^2 + var2 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau          var = exp(logvar)
    Delta  = 1/2 sum( mean1^2 + var1 - mean2^2 - var2 )
    W2^2   = sum( (mean1 - mean2)^2 + (sd1 - sd2)^2 )                                         sd = exp(logvar / 2)
    bound  = W2^2 / 2 + sqrt(sum( mean1^2 + var1 )) W2                                        of |Delta|

Sums run over latent entries; all four results are means over the N tokens kept, with logvar clamped to [-20, 20]. It is
a diagnostic: the kernels have no backward.
"""

import torch
from torch import Tensor

from .. import reference
from . import _backend
from ._checks import rows, token_flags
from ._raw import RAW
from .divergence import check_posteriors


def geometry(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float = 1.5,
    prior2_std: float = 1.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mismatch, discrepancy, distance and bound; `fk.diagnostics.latent_geometry` gives them by name.

    Equivalent to::

        q1, q2 = Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp())
        mismatch = (kl_divergence(q2, p1) - kl_divergence(q2, p2)).sum(-1).mean()
        discrepancy = 0.5 * (mean1**2 + q1.variance - mean2**2 - q2.variance).sum(-1).mean()
        w2 = ((mean1 - mean2) ** 2 + (q1.stddev - q2.stddev) ** 2).sum(-1)
        bound = (w2 / 2 + (mean1**2 + q1.variance).sum(-1).sqrt() * w2.sqrt()).mean()
        result = mismatch, discrepancy, w2.mean(), bound

    The kernels have no backward. Where an input requires grad and no backend is named, plain PyTorch runs.

    Args:
        mean1, logvar1, mean2, logvar2: [..., R], as `encode` returns them.
        prior2_mean, prior2_std: mean and standard deviation of every entry of p_2.
        mask: [...], bool or of zeros and ones: the tokens that count. None is all of them.
        backend: "triton", "cpp" or "reference"; None takes the fastest for the device of mean1.

    Returns:
        Lambda, Delta (nats), W2^2 and the bound of |Delta|: 0-dim, means over tokens, 0 if there are none; float32
        for half dtypes, else the dtype of mean1.

    Raises:
        TypeError: not floating point, or more than one dtype.
        ValueError: shapes do not fit, more than one device, or an invalid prior.
        BackendUnavailable: the named backend cannot run here, or is a kernel and an input requires grad.
    """
    check_posteriors("geometry", mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (mean1, logvar1, mean2, logvar2))
    named = _backend._selected if backend is None else backend
    backend = "reference" if needs_grad and named is None else _backend.resolve("geometry", mean1.device, backend)
    if backend == "reference":
        return reference.geometry(mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask)
    if needs_grad:
        raise _backend.BackendUnavailable(
            f"backend {backend!r} was asked for to run geometry, but cannot: its kernel has no backward, and an input "
            "requires grad; call it under torch.no_grad(), or leave the backend unnamed."
        )
    posteriors = (rows(t) for t in (mean1, logvar1, mean2, logvar2))
    results = RAW[backend].geometry_fwd(*posteriors, float(prior2_mean), float(prior2_std), token_flags(mask))
    mismatch, discrepancy, w2_squared, bound = results.unbind()
    return mismatch, discrepancy, w2_squared, bound
