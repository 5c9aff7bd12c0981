"""Symmetric matrices by their lower triangles: half of the products, half of the bytes.

A matrix is worked on in blocks of rows, each from the first column to the diagonal. On disk it is
packed: the lower triangle row by row, ``C[numpy.tril_indices(n)]``.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


def row_blocks(size: int) -> list[slice]:
    """Blocks of rows of a (size, size) matrix: at most 16, so that 17/32 of it is multiplied.

    Narrow blocks multiply slowly, so none is narrower than 192 (but the last).
    """
    step = max(192, -(-size // 16))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def pack(blocks: list[Tensor]) -> Tensor:
    """Blocks of rows, as :func:`row_blocks` cuts them -> packed (n (n + 1) / 2,) on the host."""
    size = blocks[-1].shape[1]
    packed = torch.empty(size * (size + 1) // 2, dtype=blocks[0].dtype)
    end = 0
    for cut, block in zip(row_blocks(size), blocks, strict=True):
        rows = [row[: cut.start + i + 1] for i, row in enumerate(block.cpu())]
        start, end = end, end + sum(map(len, rows))
        torch.cat(rows, out=packed[start:end])
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Packed (n (n + 1) / 2,) -> lower-triangular (n, n), zero above the diagonal."""
    size = (isqrt(8 * len(packed) + 1) - 1) // 2
    full = packed.new_zeros(size, size)
    for i, row in enumerate(packed.split([*range(1, size + 1)])):
        full[i, : i + 1] = row
    return full
