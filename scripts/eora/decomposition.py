"""Layer by layer: error and second moment in, factors out."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from eora import block_files, covariance, factor_files, solver
from eora.architectures import dense_weight, linear_layers
from eora.smoothing import Smoothing
from eora.streaming import BlockStream


def metrics(
    inputs: covariance.Moments,
    device: torch.device,
    method: solver.Method,
    smoothing: Smoothing | None,
    block: str,
) -> Callable[[str], solver.Metric]:
    """Local name of a layer -> what its errors are measured by, on the device.

    The last is kept: layers that read the same input follow each other and share it, and the scales
    by which a compression divided that.

    Args:
        inputs: the block's second moments.
        device: where they are wanted.
        method: of the solver.
        smoothing: how the compression rescaled what layers read; None where the second moments are
            its own.
        block: the block's full name.
    """

    @lru_cache(maxsize=1)
    def of_input(name: str) -> solver.Metric:
        moment = inputs.lower(name).to(device)
        if smoothing is not None:
            moment = smoothing.moment(f"{block}.{name}", moment)
        return solver.Metric(moment, method)

    return lambda layer: of_input(inputs.shared[layer])


def decompose_block(
    original: BlockStream,
    compressed: BlockStream,
    index: int,
    moments: Path,
    out: Path,
    max_rank: int,
    method: solver.Method,
    smoothing: Smoothing,
    compressed_inputs: bool = False,
) -> None:
    """Decompose every linear layer of one block; writes a file, see :func:`eora.factor_files.save`.

    Args:
        original, compressed: the two models.
        index: the block.
        moments: folder of the second moments' block files.
        out: folder for the factors' block file.
        smoothing: how the compression rescaled what layers read.
        compressed_inputs: the second moments are of the compressed model's own inputs.
    """
    inputs = covariance.Moments(moments / block_files.name(index))
    rescaled = None if compressed_inputs else smoothing
    metric = metrics(inputs, original.device, method, rescaled, original.name(index))
    found: dict[str, solver.Factors] = {}
    with original.block(index) as exact, compressed.block(index) as rounded:
        approximate = linear_layers(rounded)
        layers = linear_layers(exact)
        transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
        for name, layer in layers.items():
            full = f"{original.name(index)}.{name}"
            weight = smoothing.weight(full, dense_weight(layer).float())
            error = weight - dense_weight(approximate[name]).float()
            found[full] = solver.decompose(error, metric(name), max_rank).cpu()
    factor_files.save(out / block_files.name(index), found, transposed)
