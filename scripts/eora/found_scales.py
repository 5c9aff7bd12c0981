"""Scales by which a finished checkpoint divided what its layers read, found in its weights.

AWQ (arXiv 2306.00978) and SmoothQuant (2211.10438) put ``s`` into a layer's columns and ``1 / s``
into the norm before it, or into the rows of the layer before it. A published checkpoint does not
say so: its weights are rounded, and nothing names the layers that belong together. But rounding
errors average out over a row or a column, so that the weights tell every layer's scales to a
percent; norms, which are not rounded, tell them exactly once it is known which layer reads which.

No names are needed: a layer's scales are explained by the norm, or by the layer's rows, that they
agree with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eora.smoothing import Scales

# An explanation must leave less than this of what scales vary by; of noise alone it leaves 1.
_LEFT = 0.7
# And no more than so many times what rounding errors leave, and what norms in 16 bits do.
_NOISE, _SIXTEEN_BITS = 3, 0.02
# Rows of a layer that a norm is said to be read by, whose own scale must be 1, and how nearly.
_PLAIN_ROWS, _PLAIN = 0.3, 0.05
# Norms that multiply by 1 + weight, as Gemma's, and by weight.
_OFFSETS = (0.0, 1.0)


class Side(NamedTuple):
    """What a layer's inputs, or its outputs, are divided by.

    Attributes:
        logs: (channels,) logarithms, up to a common summand.
        precision: (channels,) how sure each is: one over its variance.
    """

    logs: Tensor
    precision: Tensor

    def mean(self, logs: Tensor) -> Tensor:
        """A scalar: of these logarithms, each as sure as this side's."""
        return (self.precision * logs).sum() / self.precision.sum()

    def spread(self, logs: Tensor) -> float:
        """How far these logarithms vary, a common summand left out."""
        return self.mean((logs - self.mean(logs)).square()).sqrt().item()

    def explained(self, by: Mapping[str, Tensor]) -> str | None:
        """Which of several scales these agree with, if any."""
        left = {name: self.spread(self.logs - logs) for name, logs in by.items()}
        best = min(left, key=left.get, default=None)
        noise = (len(self.logs) / self.precision.sum()).sqrt().item()
        most = min(_LEFT * self.spread(self.logs), _NOISE * noise + _SIXTEEN_BITS)
        return best if best is not None and left[best] < most else None


class Fit(NamedTuple):
    """The scales that bring a layer's weight nearest to another."""

    input: Side
    output: Side


def _side(scales: Tensor, energy: Tensor, noise: Tensor) -> Side:
    """Channels of which rounding left nothing are not sure at all."""
    known = scales > 0
    precision = torch.where(known, energy / noise.clamp(min=1e-30), 0).clamp(min=1e-30)
    return Side(torch.where(known, scales, 1).log(), precision)


def fit(before: Tensor, after: Tensor) -> Fit:
    """Scales that bring a weight (out, in) nearest to a rescaled and rounded one.

    Columns and rows are fitted in turn, by least squares.
    """
    product, square = before * after, before.square()
    rows = before.new_ones(len(before))  # 1 / t
    for _ in range(3):
        columns = (rows @ product) / (rows.square() @ square).clamp(min=1e-30)
        rows = (product @ columns) / (square @ columns.square()).clamp(min=1e-30)
    fitted = before * columns * rows[:, None]
    noise, energy = (fitted - after).square().mean(), fitted.square()
    inputs = _side(columns, energy.sum(0), noise)
    outputs = _side(rows, energy.sum(1), noise)
    return Fit(inputs, outputs._replace(logs=-outputs.logs))


def _ratios(norms: Mapping[str, tuple[Tensor, Tensor]], width: int) -> dict[str, Tensor]:
    """Norm and offset -> logarithm of what its outputs are divided by, of those of one width."""
    found = {}
    for name, (before, after) in norms.items():
        for offset in _OFFSETS if len(before) == width else ():
            ratio = (before.float() + offset) / (after.float() + offset)
            logs = torch.where(ratio > 0, ratio, torch.nan).log()
            if logs.isfinite().any():
                found[f"{name}+{offset}"] = logs.nan_to_num()
    return found


def explain(
    fits: Mapping[str, Fit], norms: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Scales], dict[str, Tensor]]:
    """The scales of a block's layers, told from norms and from layers that write what others read.

    Args:
        fits: layer -> :func:`fit` of it.
        norms: of those that differ: name -> weight (width,) of the original, and of the checkpoint.

    Returns:
        layer -> its scales, of those that have any, and norm -> what its outputs are divided by
        (width,). A norm that no layer's columns agree with is not among them.
    """
    inputs: dict[str, Tensor] = {}
    read: dict[str, list[str]] = {}
    for layer, found in fits.items():
        ratios = _ratios(norms, len(found.input.logs))
        if norm := found.input.explained(ratios):
            inputs[layer] = ratios[norm]
            read.setdefault(norm, []).append(layer)
    # Inputs divided by any factor, and outputs by its inverse: the same weight.
    rows = {
        layer: found.output.logs
        + found.input.mean(inputs.get(layer, torch.zeros(())) - found.input.logs)
        for layer, found in fits.items()
    }
    told = {
        norm.rpartition("+")[0]: inputs[layers[0]].exp()
        for norm, layers in read.items()
        if any((rows[layer].abs() < _PLAIN).float().mean() > _PLAIN_ROWS for layer in layers)
    }
    outputs: dict[str, Tensor] = {}
    for layer, found in fits.items():
        if layer in inputs:
            continue
        width = len(found.input.logs)
        # The last rows: of layers in one, the values, and what the activation is multiplied with.
        writers = {
            name: rows[name][-width:] for name in fits if name != layer and len(rows[name]) >= width
        }
        if writer := found.input.explained(writers):
            ours, theirs = (
                found.input,
                Side(writers[writer], fits[writer].output.precision[-width:]),
            )
            logs = ours.logs + ours.mean(theirs.logs - ours.logs)
            weighted = theirs.precision * theirs.logs + ours.precision * logs
            inputs[layer] = weighted / (theirs.precision + ours.precision)
            outputs[writer] = torch.zeros_like(rows[writer])
            outputs[writer][-width:] = inputs[layer]
    scales = {
        layer: Scales(
            inputs.get(layer, torch.zeros_like(found.input.logs)).exp(),
            outputs.get(layer, torch.zeros_like(found.output.logs)).exp(),
        )
        for layer, found in fits.items()
        if layer in inputs or layer in outputs
    }
    return scales, told
