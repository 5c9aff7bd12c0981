"""The largest eigenpairs of a positive semidefinite matrix: directly, or iterated and certified.

Of M (n x n) a low-rank fit wants r << n directions; what they leave is
``left = tr(M) - (their eigenvalues' sum)``. A direct method reduces all of M to tridiagonal form,
in float64. A block Krylov space of a few r columns, built by products in float32, holds directions
as good, and the proof that they are is one Cholesky factorisation, the only n^3 term.

*Bound.* For orthonormal X (n x k, k > r) with Ritz values Theta = X^T M X (diagonal, descending)
and residual R = M X - X Theta, let N = (I - X X^T) M (I - X X^T) be the rest. If N <= mu, then for
every gap > 0, completing the square in the coupling R,

    M <= X (Theta + R^T R / gap) X^T + (mu + gap) (I - X X^T).

With gap = theta_r - mu, the r largest eigenvalues of M sum to at most those of the k x k matrix
``Theta + R^T R / gap``. ``N <= mu`` is proved by a Cholesky factor of ``mu - N``: nothing is
assumed of M's spectrum, or of how X was found. What cannot be proved is left to the direct method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import scipy.linalg
import torch
from torch import Tensor

# What the directions may leave above the least possible, relative to it.
_EXCESS = 1e-6
# A Krylov space is large enough at this share of it: its estimate does not know of the rounding of
# its products, in float32, ...
_AIM = 0.1
# ... which a step of power iteration in float64 takes away, as many times.
_REFINEMENTS = 3
# An objective left that is below this share of the trace is rounding noise in float64.
_NOISE = 1e-12


def top(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues of ``matrix``, with eigenvectors.

    Args:
        matrix: (n, n) float32 or float64, symmetric, positive semidefinite but for rounding.
        rank: 1 to n.

    Returns:
        (rank,) float64, descending and >= 0, and (n, rank) float64, orthonormal. What they leave
        of the trace is the least possible but for 1e-6 of it, or for rounding in float64.
    """
    exact = matrix.double()
    found = iterated(exact, rank) if pays(len(matrix), rank) else None
    return found or direct(exact, rank)


def pays(size: int, rank: int) -> bool:
    """Whether to try iteration before the direct method, by their times on one core of a CPU.

    On layers with benchmarks/solver.py's inputs it takes as long at 1,280 wide; at 2,560, the
    direct method takes 1.3 to 2.5 times as long (ranks 32 to 160), at 5,120, 2.3 to 3.7 times (128
    and 320). A spectrum so flat that nothing is found (white noise, 2,048 wide) costs 1.7 times
    the direct method alone. Of libraries', torch.svd_lowrank takes as long as the direct method
    for an excess of 1e-5 at 2,560 wide, without a proof, and torch.lobpcg 2 to 5 times as long.
    A card with few float64 units gains more: of float64, that is n^3 / 3 + 8 n^2 r operations
    against the direct method's 5 n^3 (not timed).
    """
    return size >= 2000 and 16 * rank <= size


def direct(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """:func:`top` of a float64 matrix by LAPACK or cuSOLVER."""
    if matrix.is_cuda or len(matrix) < 1000 or rank > len(matrix) // 2:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[-rank:], vectors[:, -rank:]
    else:  # LAPACK computes the vectors that are wanted, where torch has all of them or none
        wanted = (len(matrix) - rank, len(matrix) - 1)
        found = scipy.linalg.eigh(matrix.numpy(), subset_by_index=wanted, check_finite=False)
        values, vectors = map(torch.from_numpy, found)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def iterated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """:func:`top` of a float64 matrix by a Krylov space; None if that it is cannot be proved."""
    start = ritz_vectors(matrix, rank)
    return None if start is None else certified(matrix, rank, start)


def certified(matrix: Tensor, rank: int, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`top` of a float64 matrix from a guess, refined; None unless its excess is proved.

    start: (n, k) float64, k > rank, of full column rank; meant to span the k largest directions.
    """
    for _ in range(1 + _REFINEMENTS):
        vectors = torch.linalg.qr(start).Q
        image = matrix @ vectors
        values, mixing = _descending(vectors.T @ image)
        vectors, image = vectors @ mixing, image @ mixing
        residual = image - vectors * values
        if _excess(values, residual, rank) <= _EXCESS * _left(matrix, values, rank):
            if _rest_is_below(_ceiling(values, rank), matrix, values, vectors, residual):
                return values[:rank].clamp(min=0), vectors[:, :rank]
            return None
        start = image
    return None


def ritz_vectors(matrix: Tensor, rank: int) -> Tensor | None:
    """(n, k) float64, k > rank: the largest Ritz vectors of a float64 matrix in the first block
    Krylov space in which ``rank`` of them seem good enough; None if it would grow too large."""
    mean = matrix.diagonal().mean().item()
    size, kept = len(matrix), rank + max(8, rank // 4)
    # Narrow blocks make much of each column; wider ones, less of the time that a step takes.
    width = min(max(32, rank // 4), 64)
    # By a power of two: a matrix that was made in float32 stays what it is, at any scale.
    scaled = (matrix / 2.0 ** math.frexp(mean)[1]).float()
    examined = max(3 * rank, 6 * width)
    for basis, projected, coupling in _krylov(scaled, width, 3 * size // 8):
        if basis.shape[1] < examined:
            continue
        examined = 1.25 * basis.shape[1]
        values, mixing = _descending(projected.double())
        values, mixing = values[:kept], mixing[:, :kept]
        residual = coupling.double() @ mixing[-width:]
        if _excess(values, residual, rank) <= _AIM * _EXCESS * _left(scaled, values, rank):
            return (basis @ mixing.to(basis.dtype)).double()
    return None


def _krylov(matrix: Tensor, width: int, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Krylov spaces of 1, 2, ... blocks of ``width`` columns, up to ``most`` columns.

    Yields an orthonormal basis Q (n, m), Q^T M Q (m, m; its lower triangle alone) and a coupling
    E (width, width): ``M Q - Q (Q^T M Q)`` is zero but for the last block of columns, where it is
    orthonormal columns times E.
    """
    most -= most % width
    # Drawn on the CPU from a seed of its own: the same on every device, and torch's stays as it is.
    block = torch.randn(len(matrix), width, generator=torch.Generator().manual_seed(0))
    block = torch.linalg.qr(block.to(matrix)).Q
    basis = matrix.new_empty(len(matrix), most)
    projected = matrix.new_zeros(most, most)
    for last in range(0, most, width):
        end = last + width
        basis[:, last:end] = block
        known = basis[:, :end]
        image = matrix @ block
        weights = known.T @ image
        projected[last:end, :end] = weights.T
        block, once = torch.linalg.qr(image.sub_(known @ weights))
        block, twice = torch.linalg.qr(block - known @ (known.T @ block))
        yield known, projected[:end, :end], twice @ once


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _left(matrix: Tensor, values: Tensor, rank: int) -> Tensor:
    """What of the trace ``rank`` directions leave, no less than the rounding of it."""
    whole = matrix.diagonal().double().sum()
    return (whole - values[:rank].sum()).clamp(min=_NOISE * whole)


def _ceiling(values: Tensor, rank: int) -> Tensor:
    """mu: halfway from the last Ritz value that is wanted to the last that there is. The rest is
    well below it, if all have converged, and it leaves a gap."""
    return (values[rank - 1] + values[-1]) / 2


def _excess(values: Tensor, residual: Tensor, rank: int) -> Tensor:
    """How much more than their Ritz values the ``rank`` largest eigenvalues can sum to, if the rest
    is below :func:`_ceiling`. values: (k,); residual: (any, k), of which R^T R is read."""
    gap = values[rank - 1] - _ceiling(values, rank)
    if not gap > 0:
        return torch.full_like(gap, torch.inf)
    lifted = torch.diag(values) + residual.T @ residual / gap
    return torch.linalg.eigvalsh(lifted)[-rank:].sum() - values[:rank].sum()


def _rest_is_below(
    mu: Tensor, matrix: Tensor, values: Tensor, vectors: Tensor, residual: Tensor
) -> bool:
    """Whether mu - N has a Cholesky factor; N = M - H X^T - X H^T with H = X Theta / 2 + R.

    What is found for a matrix A is the factor of one within n eps tr(A) of it (Higham, Accuracy
    and Stability of Numerical Algorithms, theorem 10.3). So mu is lowered by that, and by as large
    a share of M's trace, for the rounding of N.
    """
    size = len(matrix)
    rounding = size * torch.finfo(matrix.dtype).eps * (size * mu + matrix.trace())
    half = vectors * (values / 2) + residual
    left, right = torch.cat([half, vectors], 1), torch.cat([vectors, half], 1)
    rest = torch.addmm(matrix, left, right.T, beta=-1)
    rest.diagonal().add_(mu - rounding)
    return not torch.linalg.cholesky_ex(rest).info
