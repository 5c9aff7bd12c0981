"""Low-bit factors without loss: round A, fit B to what became of it, and round B with feedback.

An adapter's product has a freedom that rounding can use: ``B A = (B T)(T^-1 A)`` for any invertible
T, and B may be fitted again once A is rounded. In the layer's own objective

    tr((D - B A) C (D - B A)^T) = const + tr((B - B*) H (B - B*)^T),   H = A C A^T (r x r),
                                                                       B* = D C A^T H^-1,

so B is rounded in a metric of only r x r, row of B^T by row, each handing its error to those that
are still to come (as GPTQ does; Frantar et al., arXiv 2210.17323). What is left then goes with the
geometric mean of H's pivots, where plain rounding leaves their arithmetic mean. EoRA's own factors
have H diagonal and steep, where errors cannot be handed on at all; a fixed rotation T of the rank
directions spreads it.

Neither D nor C is needed whole: A's rounding error is small and random, so all that must be known
of C is ``A C`` (r x in) and the diagonal, which the decomposition leaves beside the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A group's scale is searched among these shares of the one that just holds its extreme value.
_SHARES = (0.65, 0.72, 0.79, 0.86, 0.93, 1.0)
_HALF = torch.finfo(torch.float16)
_SMALLEST = 16 * _HALF.smallest_normal * _HALF.eps  # of a scale; a group of zeros takes any
# Directions of A C A^T below this share of the largest are rounding noise of what it is made from.
_NOISE = 1e-7
# Pull of B towards what it was, relative to the mean of H's diagonal: it decides where H is zero.
_PULL = 1e-6
# Rounds of fitting; a second takes an eighth off what the first leaves, a third hardly more.
_PASSES = 2


@dataclass(frozen=True)
class Rounded:
    """A matrix on its grid.

    values: (rows, columns) float32, integers times scales.
    scale: (rows, groups) float16, may be negative: a grid reaches one step further on one side, and
        the sign says which side of the group that is.
    """

    values: Tensor
    scale: Tensor


def _stacked(rows: list[Rounded]) -> Rounded:
    return Rounded(torch.cat([row.values for row in rows]), torch.cat([row.scale for row in rows]))


def width(columns: int, group_size: int) -> int:
    """Columns that share a scale; the last group may hold fewer."""
    return min(columns, group_size)


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> (rows, groups, width); the last group is filled up with zeros."""
    group = width(matrix.shape[1], group_size)
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group))
    return padded.unflatten(1, (-1, group))


def _on_grid(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """groups (..., width) to the nearest integers times scale (...)."""
    scale = scale[..., None]
    limit = 2 ** (bits - 1)
    return (groups / scale).round_().clamp_(-limit, limit - 1).mul_(scale)


def nearest(matrix: Tensor, bits: int, group_size: int) -> Rounded:
    """Round each value to its group's grid; the scales are those of least squared error.

    Args:
        matrix: (rows, columns) float32.
        bits: of a value.
        group_size: columns that share a scale.
    """
    if len(matrix) > 1:  # all scales of a row are tried at once
        return _stacked([nearest(row, bits, group_size) for row in matrix.split(1)])
    groups = grouped(matrix, group_size)
    limit = 2 ** (bits - 1)
    ends = torch.tensor([-limit, limit - 1, 0.5 - limit])  # the last is plain rounding's
    tried = (torch.tensor(_SHARES)[:, None] / ends).flatten()
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (extreme * tried).clamp(_HALF.min, _HALF.max)
    scales = torch.where(scales.abs() < _SMALLEST, _SMALLEST, scales).half().float()
    errors = (_on_grid(groups[..., None, :], scales, bits) - groups[..., None, :]).square_().sum(-1)
    scale = scales.gather(-1, errors.argmin(-1, keepdim=True))[..., 0]
    values = _on_grid(groups, scale, bits).flatten(1)[:, : matrix.shape[1]]
    return Rounded(values, scale.half())


def in_metric(matrix: Tensor, metric: Tensor, bits: int, group_size: int) -> Rounded:
    """Round (rows, columns) so that tr(E^T metric E) of the error E becomes small.

    Row by row: what a row's rounding misses is made up for by the rows after it.

    Args:
        matrix: (rows, columns) float32.
        metric: (rows, rows) float64, positive definite.
        bits: of a value.
        group_size: columns that share a scale.
    """
    # Row i of the upper triangular root of metric^-1, over its diagonal: how rows after i make up.
    root = torch.linalg.cholesky(torch.linalg.inv(metric), upper=True)
    shares = (root / root.diagonal()[:, None]).float()
    matrix = matrix.clone()
    rows = []
    for i in range(len(matrix)):
        rows.append(nearest(matrix[i : i + 1], bits, group_size))
        missed = matrix[i] - rows[-1].values[0]
        matrix[i + 1 :].addr_(shares[i, i + 1 :], missed, alpha=-1)
    return _stacked(rows)


def rotation(size: int) -> Tensor:
    """An orthogonal (size, size) that mixes all directions: the discrete cosine transform."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * steps[:, None] * (steps + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _moments(a: Tensor, cross: Tensor, channels: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """What B is fitted by: ``rounded C a^T`` and ``rounded C rounded^T`` (both (r, r) float64).

    A row of ``rounded`` is a combination of a's rows, of which C is known, and a rest that is
    uncorrelated with them; of that, the part of C's diagonal counts that they do not explain.
    """
    known = (a @ cross.T).double()
    values, vectors = torch.linalg.eigh((known + known.T) / 2)
    inverse = torch.where(values > _NOISE * values[-1], 1 / values, 0.0)
    inverse = (vectors * inverse) @ vectors.T
    towards = (rounded @ cross.T).double()
    weights = towards @ inverse
    rest = rounded - weights.float() @ a
    explained = (cross * (inverse.float() @ cross)).sum(0)
    unexplained = (channels - explained).clamp(min=0)
    own = weights @ towards.T + ((rest * unexplained) @ rest.T).double()
    return towards, (own + own.T) / 2


def refit(
    a: Tensor, b: Tensor, cross: Tensor, channels: Tensor, bits: int, group_size: int
) -> tuple[Rounded, Rounded]:
    """Low-bit factors whose product does what ``b @ a`` does for the layer's inputs.

    Args:
        a: (r, in), b: (out, r): EoRA's factors of this rank.
        cross: (r, in), ``a @ C``, for the C that they were fitted by, at any scale.
        channels: (in,), the diagonal of that C at the same scale.
        bits: of a value.
        group_size: values of a row of A, or of a column of B, that share a scale.

    Returns:
        A (r, in) and B^T (r, out), rounded; only their product is like that of a and b.
    """
    a, b, cross, channels = (tensor.float() for tensor in (a, b, cross, channels))
    # B's columns to one length: its rounding errors then count as H says and nothing else.
    length = b.norm(dim=0)
    b = torch.where(length > 0, b / length, 0.0)
    turn = rotation(len(a)).float()
    a, cross = (turn @ (tensor * length[:, None]) for tensor in (a, cross))
    b_t = turn @ b.T
    # And both factors to one size, far from the ends of float16.
    size = (b_t.norm() * math.sqrt(a.numel()) / (a.norm() * math.sqrt(b_t.numel()))).sqrt().item()
    size = size if math.isfinite(size) and size > 0 else 1.0
    a, cross, b_t = a * size, cross * size, b_t / size

    best, least, wanted = None, math.inf, a
    for _ in range(_PASSES):
        low_a = nearest(wanted, bits, group_size)
        towards, metric = _moments(a, cross, channels, low_a.values)
        pull = _PULL * metric.diagonal().mean() or torch.ones((), dtype=metric.dtype)
        eye = torch.eye(len(metric), dtype=metric.dtype)
        towards, metric = towards + pull * eye, metric + pull * eye
        fitted = torch.linalg.solve(metric, towards).float() @ b_t
        low_b = in_metric(fitted, metric, bits, group_size)
        made = low_b.values.double()
        aim = towards @ b_t.double()
        left = ((metric @ made - 2 * aim) * made).sum().item()  # but for a constant
        if left < least:
            best, least = (low_a, low_b), left
        # The A that suits this B best, whatever the inputs are: least squares in B's columns.
        gram = made @ made.T
        gram.diagonal().add_(_PULL * gram.diagonal().mean() or 1.0)
        wanted = torch.linalg.solve(gram, made @ b_t.double().T).float() @ a
    return best
