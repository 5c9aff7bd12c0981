"""The scales of a rounded model, solved for anew; its integers stay as they are.

A layer of a rounded model is ``s q``: integers (less their zero points) in groups that share a
scale. With the integers fixed, the output error is quadratic in the scales, so that the best ones
beside an adapter B A follow from a linear system for each row of the weight. The adapter that is
best beside them follows from :mod:`eora.solver`, and so on in turn. No gradient is taken, and no
byte is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eora import covariance, decomposition
from eora.architectures import dense_weight, linear_layers
from eora.errors import Mistake
from eora.smoothing import Smoothing
from eora.solver import Metric, decompose
from eora.streaming import BlockStream

# Weight of a scale's distance from its old value, relative to what a group's own error weighs:
# groups that the calibration says little of keep the scale that rounding gave them.
RIDGE = 1e-3
# Bytes of the rows' systems that are solved at once.
SYSTEMS = 1 << 29
# Names that the formats give to a layer's scales: AutoRound's and GPTQ's, compressed-tensors'.
_TRANSPOSED, _UPRIGHT = "scales", "weight_scale"


def _systems(codes: Tensor, lower: Tensor) -> Tensor:
    """P C P^T of each row, P being its codes spread out, a row a group: the lower triangles.

    Args:
        codes: (rows, groups, group_size).
        lower: (in, in), the lower triangle of C.

    Returns:
        (rows, groups, groups) float64.
    """
    rows, groups, size = codes.shape
    flat = codes.reshape(rows, -1)
    found = flat.new_zeros(rows, groups, groups, dtype=torch.float64)
    for i in range(groups):
        own, before = slice(i * size, (i + 1) * size), slice(i * size)
        corner = lower[own, own].tril()
        product = codes[:, i] @ (corner + corner.tril(-1).T)
        found[:, i, i] = (product * codes[:, i]).sum(1)
        if i:
            product = (codes[:, i] @ lower[own, before]) * flat[:, before]
            found[:, i, :i] = product.view(rows, i, size).sum(2)
    return found


def refit(error: Tensor, codes: Tensor, scales: Tensor, metric: Metric) -> Tensor:
    """Scales that make a layer's output error least, its integers and its adapter being fixed.

    For each row with error e, codes P (groups x in) and scales s, the change d minimises
    ``(e - d P) C (e - d P)^T + RIDGE sum_g (P C P^T)_gg d_g^2``.

    Args:
        error: (out, in) float32, W - B A - s q.
        codes: (out, groups, group_size) float32, the integers less their zero points.
        scales: (out, groups) float32.
        metric: of the layer's inputs, whose whole second moment errors are measured by.

    Returns:
        (out, groups) float32.
    """
    groups = codes.shape[1]
    at_once = max(1, SYSTEMS // (16 * groups**2))
    found = []
    for some, part, old in zip(
        metric.times(error).split(at_once), codes.split(at_once), scales.split(at_once), strict=True
    ):
        left = _systems(part, metric.moment) / metric.unit
        diagonal = left.diagonal(dim1=1, dim2=2)
        # Of codes or inputs that are zero: the scale stays.
        diagonal.mul_(1 + RIDGE).masked_fill_(diagonal <= 0, 1)
        right = (some.view_as(part) * part).sum(2, dtype=torch.float64)
        root = torch.linalg.cholesky(left)
        change = torch.cholesky_solve(right[..., None], root)[..., 0]
        found.append(old + change.to(old.dtype))
    return torch.cat(found)


@dataclass(frozen=True)
class Rounded:
    """A rounded layer.

    Attributes:
        codes: (out, groups, group_size) float32, its integers less their zero points.
        scales: (out, groups) float32.
        stored: name of the scales' tensor in the layer.
        transposed: whether that holds them as (groups, out).
    """

    codes: Tensor
    scales: Tensor
    stored: str
    transposed: bool

    def weight(self, scales: Tensor) -> Tensor:
        """(out, in) float32 with these scales."""
        return (self.codes * scales[..., None]).flatten(1)


def rounded(layer: nn.Module) -> Rounded | None:
    """What a layer was rounded to; None if it is not.

    Raises:
        Mistake: its format is none of integers in groups along the input.
    """
    for name in (_TRANSPOSED, _UPRIGHT):
        if (stored := getattr(layer, name, None)) is not None:
            break
    else:
        return None
    weight = dense_weight(layer).float()
    transposed = name == _TRANSPOSED
    scales = stored.T if transposed else stored
    if not stored.is_floating_point() or scales.shape[:1] != weight.shape[:1]:
        raise Mistake("its scales are no numbers of rows and groups")
    scales = scales.float().reshape(len(weight), -1)
    codes = weight.view(*scales.shape, -1) / torch.where(scales == 0, 1, scales)[..., None]
    whole = codes.round()
    if (codes - whole).abs().max() > 0.25:  # 16-bit products of 8-bit integers are 0.13 off
        raise Mistake("it holds no integers")
    return Rounded(whole, scales, name, transposed)


def rescale_layer(
    weight: Tensor, layer: Rounded, metric: Metric, rank: int, rounds: int
) -> tuple[Tensor, float]:
    """Scales for a layer and an adapter of some rank, in turn fitted to what the other leaves.

    Without an adapter the layers' errors fall too, but AutoRound's scales, which blocks' outputs
    were learned with, serve a model better: see docs/research.md.

    Args:
        weight: (out, in) float32, the original's.
        layer: what it was rounded to.
        metric: of its inputs.
        rank: of the adapter.
        rounds: how often scales are fitted, at least 1.

    Returns:
        (out, groups) float32, and the share of the output error, with such an adapter beside the
        layer, that is left after the last round.
    """
    scales, before = layer.scales, 0.0
    for done in range(rounds):
        error = weight - layer.weight(scales)
        fitted = decompose(error, metric, rank)
        error -= fitted.lora_B @ fitted.lora_A
        if done == 0:
            before = metric.objective(error)
        old, scales = scales, refit(error, layer.codes, scales, metric)
        error -= layer.weight(scales - old)
    return scales, metric.objective(error) / before if before else 1.0


def _write_over(stream: BlockStream, copy: Path, name: str, values: Tensor) -> None:
    """Write a tensor of a streamed model over in a copy of its folder, in its stored shape and
    dtype."""
    path, where = stream.place(name)
    data = values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    assert len(data) == where.stop - where.start
    with (copy / path.name).open("r+b") as file:
        file.seek(where.start)
        file.write(data)


def rescale(
    original: BlockStream,
    compressed: BlockStream,
    moments: Callable[[int], Path],
    smoothing: Smoothing,
    copy: Path,
    rank: int,
    rounds: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, float]:
    """Fit the scales of every rounded layer, one block at a time.

    Args:
        original, compressed: the two models.
        moments: index of a block -> the file of its second moments.
        smoothing: how the compression rescaled what layers read.
        copy: a copy of the compressed model's folder, whose scales are written over.
        rank, rounds: see :func:`rescale_layer`.
        progress: wraps the block indices, for a progress bar.

    Returns:
        Block's name -> share of the output error that is left, mean over its layers.

    Raises:
        Mistake: a layer is stored in a format without integers and scales, or none is rounded.
    """
    left: dict[str, float] = {}
    for index in progress(range(len(original))):
        inputs = covariance.Moments(moments(index))
        block_name = original.name(index)
        metric = decomposition.metrics(inputs, original.device, "eora", smoothing, block_name)
        shares = []
        with original.block(index) as exact, compressed.block(index) as approximate:
            layers = linear_layers(approximate)
            for local, layer in linear_layers(exact).items():
                name = f"{block_name}.{local}"
                try:
                    found = rounded(layers[local])
                except Mistake as error:
                    raise Mistake(
                        f"compressions.<name>.compression: the scales of {name} cannot be fitted "
                        f"({error}); name a compression to integers in groups"
                    ) from None
                if found is None:
                    continue
                weight = smoothing.weight(name, dense_weight(layer).float())
                scales, share = rescale_layer(weight, found, metric(local), rank, rounds)
                shares.append(share)
                old = getattr(layers[local], found.stored)
                new = (scales.T if found.transposed else scales).reshape(old.shape).to(old.dtype)
                _write_over(compressed, copy, f"{name}.{found.stored}", new)
        if shares:
            left[block_name] = sum(shares) / len(shares)
    if not left:
        raise Mistake(
            "compressions.<name>.compression: it has no rounded layer, so no scales; "
            "name a compression to few bits"
        )
    return left
