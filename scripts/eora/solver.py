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

The large products take the error's own precision (float32 for stored weights) unless one direction
is so much larger than the wanted ones that they would drown in its rounding; what is left of the
problem after them, min(out, in) wide, is solved in float64 (:mod:`eora.eigen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from eora import eigen
from eora.triangles import row_blocks

Method = Literal["eora", "diagonal", "svd"]

# Directions whose share of the largest eigenvalue is below this are rounding noise in float64.
_NOISE = 1e-12
# Rounding of the largest eigenvalue, relative to the smallest wanted, up to which products take the
# error's own precision. At 1e-2 the excess is 1e-6 (512 x 1024, rank 64) and grows by the square.
_ROUNDING = 3e-3
# Added to a second moment's diagonal, relative to it, for its Cholesky factor.
_JITTER = 1e-12


@dataclass(frozen=True)
class Factors:
    """Nested factors of one layer.

    lora_A: (R, in); lora_B: (out, R), R = min(max_rank, out, in), float32 or what the error is in.
        Column i of lora_B and row i of lora_A have equal norms, so that neither under- nor
        overflows in 16 or 4 bits. ``lora_B[:, :r] @ lora_A[:r]`` is the optimum at rank r.
    residual: (R + 1,) float64; entry r is the objective left at rank r (entry 0: without adapter).
    cross: (R, in), ``lora_A C``, of the metric's C: how what A gives goes with the inputs.
    channels: (in,), the diagonal of that C. Both are at one scale, of no meaning, and float32 or
        what the error is in. With them :mod:`eora.rounding` needs C no more.
    """

    lora_A: Tensor
    lora_B: Tensor
    residual: Tensor
    cross: Tensor
    channels: Tensor

    def cpu(self) -> Factors:
        """The same in host memory."""
        return Factors(**{name: tensor.cpu() for name, tensor in vars(self).items()})


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of this lower triangle, in place; of the upper, nothing is read."""
    for rows in row_blocks(len(lower)):
        corner = lower[rows, rows].tril()
        lower[rows, rows] = corner + corner.tril(-1).T
        lower[: rows.start, rows] = lower[rows, : rows.start].T
    return lower


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """left (n, k) @ right (k, n), known to be symmetric: the lower triangle is multiplied."""
    product = left.new_empty(len(left), len(left))
    for rows in row_blocks(len(left)):
        product[rows, : rows.stop] = left[rows] @ right[:, : rows.stop]
    return _mirrored(product)


def _times_lower(left: Tensor, lower: Tensor) -> Tensor:
    """left (m, n) @ lower (n, n), whose upper triangle is zero and not multiplied."""
    product = torch.empty_like(left)
    for columns in row_blocks(len(lower)):
        product[:, columns] = left[:, columns.start :] @ lower[columns.start :, columns]
    return product


def _times_half(left: Tensor, matrix: Tensor) -> Tensor:
    """left (m, n) @ T, where the symmetric ``matrix`` (n, n) is T + T^T and T lower-triangular."""
    product = torch.empty_like(left)
    for columns in row_blocks(len(matrix)):
        lower = matrix[columns.start :, columns].to(left.dtype).tril()
        lower.diagonal().div_(2)
        torch.matmul(left[:, columns.start :], lower, out=product[:, columns])
    return product


def _times_symmetric(left: Tensor, lower: Tensor) -> Tensor:
    """left (m, n) @ the symmetric matrix (n, n) of this lower triangle."""
    product = torch.zeros_like(left)
    for rows in row_blocks(len(lower)):
        before = slice(rows.start)
        corner = lower[rows, rows].to(left.dtype).tril()
        below = lower[rows, before].to(left.dtype)
        product[:, before] += left[:, rows] @ below
        product[:, rows] += left[:, before] @ below.T
        product[:, rows] += left[:, rows] @ (corner + corner.tril(-1).T)
    return product


def _is_finite(lower: Tensor) -> bool:
    """Whether a lower triangle is finite; piece by piece, as isfinite copies what it looks at."""
    return all(
        torch.isfinite(lower[rows, : rows.start]).all()
        and torch.isfinite(lower[rows, rows].tril()).all()
        for rows in row_blocks(len(lower))
    )


class Metric:
    """What a method measures errors by: C, as scales and correlations. Shared by all layers that
    read the same input.

    Args:
        second_moment: (in, in), E[x x^T]; symmetric, positive semidefinite, of any rank. Its lower
            triangle is read, and what is above the diagonal is not: it may hold anything.
        method: ``eora`` measures by the second moment itself, ``diagonal`` by its diagonal alone
            (LQER, ACT-S), ``svd`` by the identity (plain SVD of the error, ZeroQuant-V2).

    Raises:
        ValueError: not square, not finite, or an unknown method.
    """

    def __init__(self, second_moment: Tensor, method: Method):
        if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
            raise ValueError(f"a second moment is square, got {tuple(second_moment.shape)}")
        if not _is_finite(second_moment):
            raise ValueError("the second moment holds values that are not finite")
        if method not in ("eora", "diagonal", "svd"):
            raise ValueError(f"unknown method {method!r}: eora, diagonal or svd")
        self.method = method
        self.moment = second_moment
        self.channels = second_moment.diagonal().double().clamp(min=0)
        if method == "svd":
            self.channels = torch.ones_like(self.channels)
        # Scaling C scales the objective and nothing else; near 1 no product can under- or overflow.
        self.unit = self.channels.mean().item() or 1.0

    @cached_property
    def root(self) -> Tensor:
        """Lower-triangular S (in, in) float64 with S S^T = C / unit, whatever C's rank."""
        lower = self.moment.to(torch.float64, copy=True).div_(self.unit)
        lower.diagonal().mul_(1 + _JITTER).add_(_JITTER**2)
        root, failed = torch.linalg.cholesky_ex(lower)
        if failed:
            values, vectors = torch.linalg.eigh(lower)
            root = (vectors * values.clamp(min=0).sqrt()).T
            root = torch.linalg.qr(root, mode="r").R.T.contiguous()
        root[self.channels == 0] = 0  # never seen
        return root

    def times(self, left: Tensor) -> Tensor:
        """left (n, in) @ C / unit."""
        if self.method == "eora":
            return _times_symmetric(left, self.moment) / self.unit
        return left * (self.channels / self.unit).to(left.dtype)

    def objective(self, error: Tensor) -> float:
        """tr(error C error^T), the output error that an error (out, in) of the weight makes."""
        return (self.times(error) * error).sum(dtype=torch.float64).item() * self.unit


def _outer(error: Tensor, metric: Metric) -> Tensor:
    """M = D C D^T / unit (out, out)."""
    if metric.method != "eora":
        scaled = error * (metric.channels / metric.unit).sqrt().to(error.dtype)
        return _symmetric(scaled, scaled.T)
    scaled = error / metric.unit**0.5
    product = _times_half(scaled, metric.moment) @ scaled.T
    return product.add_(product.T.clone())


def _inner(error: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """S^T D^T D S (in, in), and the S of C / unit: lower-triangular; (in, 1) if C is diagonal."""
    if metric.method != "eora":
        root = (metric.channels / metric.unit).sqrt()[:, None]
        scaled = error * root[:, 0].to(error.dtype)
        return _symmetric(scaled.T, scaled), root
    root = metric.root.to(error.dtype)
    gram = _symmetric(error.T, error)
    right = _times_lower(gram, root)
    for rows in row_blocks(len(gram)):
        below = slice(rows.start, None)
        gram[rows, : rows.stop] = root[below, rows].T @ right[below, : rows.stop]
    return _mirrored(gram), metric.root


def _directions(error: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest eigenvalues of M (rank,) with eigenvectors (out, rank), and M's trace;
    float64, the products in the error's precision."""
    if error.shape[0] <= error.shape[1]:
        objective = _outer(error, metric)
        values, u = eigen.top(objective, rank)
    else:
        objective, root = _inner(error, metric)
        values, v = eigen.top(objective, rank)
        seen = root @ v if root.shape[1] > 1 else root * v
        # D S v / sigma, orthonormal but for rounding; QR makes it so and keeps the order.
        image = torch.cat([error[rows].double() @ seen for rows in row_blocks(len(error))])
        u = torch.linalg.qr(image).Q
    return values, u, objective.diagonal().double().sum()


def decompose(error: Tensor, metric: Metric, max_rank: int) -> Factors:
    """Nested factors that minimise the metric's objective at every rank up to ``max_rank``.

    Args:
        error: (out, in), W - W_hat, any float dtype.
        metric: what errors are measured by, on the error's device.
        max_rank: at least 1; capped at min(out, in), where the error is repaired whole.

    Returns:
        Factors; all-zero directions (no error, or inputs never seen) are zero.

    Raises:
        ValueError: shapes that do not fit, ``max_rank`` < 1, or values that are not finite.
    """
    out_features, in_features = error.shape
    if len(metric.channels) != in_features:
        raise ValueError(
            f"a metric of {len(metric.channels)} inputs does not fit an error of "
            f"{out_features} x {in_features}"
        )
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    if not torch.stack(error.aminmax()).isfinite().all():
        raise ValueError("the error holds values that are not finite")
    error = error.to(torch.promote_types(error.dtype, torch.float32))
    rank = min(max_rank, out_features, in_features)
    values, u, total = _directions(error, metric, rank)
    if torch.finfo(error.dtype).eps * values[0] > _ROUNDING * values[-1]:
        values, u, total = _directions(error.double(), metric, rank)

    noise = values <= _NOISE * values[:1]
    values = values.masked_fill(noise, 0)
    u = u.masked_fill(noise, 0).to(error.dtype)
    a = u.T @ error
    balance = a.norm(dim=1).sqrt()
    residual = torch.cat([total[None], total - values.cumsum(0)]).clamp(min=0) * metric.unit
    lora_a = torch.where(balance[:, None] > 0, a / balance[:, None], 0.0)
    return Factors(
        lora_A=lora_a,
        lora_B=u * balance,
        residual=residual,
        cross=metric.times(lora_a),
        channels=(metric.channels / metric.unit).to(a.dtype),
    )
