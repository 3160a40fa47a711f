"""Linear algebra of truncated and fitted updates, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """In float64, on the CPU if the device has none."""
    return (t.cpu() if t.device.type == "mps" else t).double()


@dataclass(frozen=True)
class Directions:
    """The update ``B z`` of latents z, in orthonormal directions of the output, the strongest first.

    ``B z = out (into z)``, and the k-th direction's energy is the mean square of the k-th entry of ``into z``. The
    first k directions are the update of rank k that loses least.

    Attributes:
        out: ``[M, K]``, orthonormal columns.
        into: ``[K, R]``.
        energies: ``[K]``.
    """

    out: Tensor
    into: Tensor
    energies: Tensor

    def rank(self, tolerance: float, dtype: torch.dtype) -> int:
        """The smallest rank that loses at most this share of the energy, at least 1.

        A share that `dtype` cannot show, below its precision squared, counts as nothing.
        """
        total = float(self.energies.sum())
        allowed = max(tolerance, torch.finfo(dtype).eps ** 2) * total
        lost = self.energies.flip(0).cumsum(0).flip(0)  # by cutting before each direction
        return max(1, int((lost > allowed).sum()))


def directions(B: Tensor, moment: Tensor) -> Directions:
    """The directions of ``B z``, for latents z with the second moment ``E z z^T = moment [R, R]``. B is ``[M, R]``."""
    Q, T = torch.linalg.qr(wide(B))
    energies, V = torch.linalg.eigh(T @ moment @ T.T)
    order = energies.argsort(descending=True)
    return Directions(Q @ V[:, order], V[:, order].T @ T, energies[order].clamp(min=0))


@dataclass(frozen=True)
class Fit:
    """A linear map of the inputs that stands for the latents: ``z = W x + c``."""

    W: Tensor  # [R, D]
    c: Tensor  # [R]
    moment: Tensor  # [R, R], of W x, with the penalty's share


def ridge_fit(inputs: Tensor, products: Tensor, ridge: float, bias: bool) -> Fit:
    """Ridge regression of latents on inputs, from sums over tokens.

    Minimises ``sum |m - W x - c|^2 + penalty |W|^2`` with penalty ``ridge`` times the mean of the inputs' squares, and
    c = 0 unless `bias`. With the penalty in `Fit.moment`, truncating ``B W x`` by its `directions` is reduced-rank
    ridge regression: of all maps of its rank it has the least penalised error.

    Args:
        inputs: ``[D + 1, D + 1]``, sum of ``[x, 1] [x, 1]^T``.
        products: ``[D + 1, R]``, sum of ``[x, 1] m^T``.
        ridge: relative penalty.
        bias: whether c is fitted.
    """
    n, D = inputs[-1, -1], len(inputs) - 1
    S, C, x, m = inputs[:D, :D], products[:D], inputs[:D, -1] / n, products[-1] / n
    if bias:
        S, C = S - n * torch.outer(x, x), C - n * torch.outer(x, m)
    penalty = ridge * float(S.trace()) / D or 1.0  # 1 where all inputs are zero
    S = S + penalty * torch.eye(D, dtype=S.dtype, device=S.device)
    W = torch.cholesky_solve(C, torch.linalg.cholesky(S)).T
    return Fit(W, m - W @ x if bias else torch.zeros_like(m), W @ C / n)


def lost_energy(update: Tensor, served: Tensor) -> float:
    """``sum |update - served|^2 / sum |update|^2``; 0 if there is no update."""
    total = update.square().sum()
    return float((update - served).square().sum() / total) if total > 0 else 0.0
