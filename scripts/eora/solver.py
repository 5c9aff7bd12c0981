"""EoRA without an inverse: compression error + second moment -> nested low-rank factors.

For a linear layer with error ``D = W - W_hat`` (out x in) and input second moment
``C = E[x x^T]`` (in x in), EoRA (arXiv 2410.21271, section 3) minimises

    tr((D - B A) C (D - B A)^T)        over rank-r products B A.

With the eigendecomposition ``M = D C D^T = U diag(lambda) U^T`` (out x out, lambda descending) the
minimiser is ``B = U_r``, ``A = U_r^T D``: the same product as the paper's projection by
``(Q Lambda^1/2)^-1``, but no inverse appears, so a rank-deficient C does no harm. The minimum is
``tr(M) - sum of the r largest lambda``, known for every r at once, and the rank-r optimum is the
first r columns/rows of any larger one.

Where out > in the same U comes from the in-side: with ``C = S S^T`` and the right singular vectors
V of ``D S``, ``U = D S V / sigma``. So no eigenproblem is larger than min(out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["eora", "diagonal", "svd"]

# Directions whose share of the largest eigenvalue is below this are rounding noise in float64.
_NOISE = 1e-12


@dataclass(frozen=True)
class Factors:
    """Nested factors of one layer.

    lora_A: (R, in) float64; lora_B: (out, R) float64, R = min(max_rank, out, in). Column i of
        lora_B and row i of lora_A have equal norms, so that neither under- nor overflows in 16 or
        4 bits. ``lora_B[:, :r] @ lora_A[:r]`` is the optimum at rank r.
    residual: (R + 1,) float64; entry r is the objective left at rank r (entry 0: without adapter).
    """

    lora_A: Tensor
    lora_B: Tensor
    residual: Tensor


def metric(second_moment: Tensor, method: Method) -> Tensor:
    """The matrix C that a method minimises in: (in, in) float64.

    ``eora`` takes the second moment itself, ``diagonal`` its diagonal alone (LQER, ACT-S), and
    ``svd`` the identity (plain SVD of the error, ZeroQuant-V2).
    """
    moment = second_moment.double()
    if method == "eora":
        return (moment + moment.T) / 2
    if method == "diagonal":
        return torch.diag(moment.diagonal().clamp(min=0))
    if method == "svd":
        return torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    raise ValueError(f"unknown method {method!r}: eora, diagonal or svd")


def square_root(matrix: Tensor) -> Tensor:
    """S (n, n) with S S^T equal to the positive semidefinite ``matrix`` (n, n); any rank."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()


def _top(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues of ``gram``, descending and >= 0, with eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].flip(1)


def decompose(error: Tensor, second_moment: Tensor, max_rank: int, method: Method) -> Factors:
    """Nested factors that minimise the method's objective at every rank up to ``max_rank``.

    Args:
        error: (out, in), W - W_hat, any float dtype.
        second_moment: (in, in), E[x x^T]; may be rank-deficient or zero.
        max_rank: at least 1; capped at min(out, in), where the error is repaired whole.
        method: which metric to minimise in, see :func:`metric`.

    Returns:
        Factors in float64. All-zero directions (no error, or inputs never seen) give zero factors.

    Raises:
        ValueError: shapes that do not fit, ``max_rank`` < 1, or values that are not finite.
    """
    out_features, in_features = error.shape
    if second_moment.shape != (in_features, in_features):
        raise ValueError(
            f"second moment {tuple(second_moment.shape)} does not fit error {tuple(error.shape)}"
        )
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    error = error.double()
    if not (torch.isfinite(error).all() and torch.isfinite(second_moment).all()):
        raise ValueError("the error or the second moment holds values that are not finite")
    c = metric(second_moment, method)
    # Scaling C scales the objective and nothing else; near 1 no product can under- or overflow.
    scale = c.diagonal().mean().item() or 1.0
    c = c / scale
    rank = min(max_rank, out_features, in_features)

    if out_features <= in_features:
        objective = error @ c @ error.T
        values, u = _top(objective, rank)
        total = objective.trace()
    else:
        scaled_error = error @ square_root(c)
        gram = scaled_error.T @ scaled_error
        values, v = _top(gram, rank)
        u = scaled_error @ v / values.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        total = gram.trace()

    noise = values <= _NOISE * values[:1]
    values = values.masked_fill(noise, 0)
    u = u.masked_fill(noise, 0)
    a = u.T @ error
    balance = a.norm(dim=1).sqrt()
    residual = torch.cat([total[None], total - values.cumsum(0)]).clamp(min=0) * scale
    return Factors(
        lora_A=torch.where(balance[:, None] > 0, a / balance[:, None], 0.0),
        lora_B=u * balance,
        residual=residual,
    )
