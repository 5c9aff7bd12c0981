"""Layers that a compression made read rescaled inputs, as AWQ (arXiv 2306.00978) does.

It divides a layer's input channels by ``s``, in the norm or the layer before, and multiplies its
weight's columns by them: ``W' = diag(1/t) W diag(s)``, where ``t`` is what a layer after this one
wants its outputs divided by. The model computes what it did, and rounding loses less. What an
adapter beside such a layer has to make up for is ``W' - W_hat``, on inputs ``x / s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Beside the compressed model; not there where inputs are as they were.
NAME = "smoothing.safetensors"


class Scales(NamedTuple):
    """What a layer's input channels are divided by (in,), and its outputs (out,); float32.

    A factor that both have in common is not told: it changes neither the weight nor, but for its
    unit, what errors are measured by.
    """

    input: Tensor
    output: Tensor


def between(before: Tensor, after: Tensor) -> Scales:
    """The scales that took a weight (out, in) to another, whose entries differ by s_j / t_i."""
    ratio = (after.double() / before.double()).abs().log()
    ratio = torch.where(ratio.isfinite(), ratio, torch.nan)  # of weights that are zero
    rows = ratio.new_zeros(len(ratio), 1)
    for _ in range(3):  # exact at once where no weight is zero
        columns = (ratio - rows).nanmean(0, keepdim=True).nan_to_num()
        rows = (ratio - columns).nanmean(1, keepdim=True).nan_to_num()
    return Scales(columns[0].exp().float(), (-rows[:, 0]).exp().float())


def save(path: Path, layers: Mapping[str, Scales]) -> None:
    """Write the scales of a model's layers, by their full names."""
    tensors = {
        f"{layer}.{side}": values.contiguous()
        for layer, scales in layers.items()
        for side, values in zip(Scales._fields, scales, strict=True)
    }
    save_file(tensors, path)


class Smoothing:
    """What :func:`save` wrote; of a compression that rescales nothing, nothing.

    Args:
        folder: the compress stage's.
    """

    def __init__(self, folder: Path):
        path = folder / NAME
        self._file = safe_open(path, framework="pt") if path.is_file() else None
        self._layers = set() if self._file is None else set(self._file.keys())

    def _scale(self, layer: str, side: str, device: torch.device) -> Tensor | None:
        name = f"{layer}.{side}"
        return self._file.get_tensor(name).to(device) if name in self._layers else None

    def weight(self, layer: str, weight: Tensor) -> Tensor:
        """The original's weight (out, in), as the layer would hold it unrounded."""
        columns = self._scale(layer, "input", weight.device)
        rows = self._scale(layer, "output", weight.device)
        return weight if columns is None else weight * columns / rows[:, None]

    def moment(self, layer: str, moment: Tensor) -> Tensor:
        """The second moment (in, in), or its lower triangle, of what the layer reads."""
        scale = self._scale(layer, "input", moment.device)
        return moment if scale is None else moment / scale / scale[:, None]
