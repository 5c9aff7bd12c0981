"""Layer by layer: error and second moment in, factors on disk out; then one rank as a slice."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from eora import covariance, solver
from eora.adapters import Pair
from eora.architectures import dense_weight, linear_layers
from eora.errors import Mistake
from eora.streaming import BlockStream

_TRANSPOSED = "transposed"


def decompose_block(
    original: BlockStream,
    compressed: BlockStream,
    index: int,
    moments: Path,
    out: Path,
    max_rank: int,
    method: solver.Method,
) -> None:
    """Decompose every linear layer of one block; writes one file with its factors.

    The file holds, for each layer (full name), ``.lora_A`` (R, in) float32, ``.lora_B`` (out, R)
    float32 and ``.residual`` (R + 1,) float64, R = min(max_rank, out, in). Its metadata says
    whether layers hold their weights as (in, out), where they do.

    Args:
        original, compressed: the two models.
        index: the block.
        moments: folder of the second moments' block files.
        out: folder for the factors' block file.
    """
    inputs = covariance.Moments(moments / covariance.block_file(index))
    tensors: dict[str, Tensor] = {}
    leader, metric = "", None  # layers that read the same input follow each other and share it
    with original.block(index) as exact, compressed.block(index) as rounded:
        approximate = linear_layers(rounded)
        layers = linear_layers(exact)
        transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
        for name, layer in layers.items():
            error = dense_weight(layer).float() - dense_weight(approximate[name]).float()
            if inputs.shared[name] != leader:
                leader = inputs.shared[name]
                metric = solver.Metric(inputs.lower(leader).to(error.device), method)
            factors = solver.decompose(error, metric, max_rank)
            full = f"{original.name(index)}.{name}"
            tensors[f"{full}.lora_A"] = factors.lora_A.cpu().contiguous()
            tensors[f"{full}.lora_B"] = factors.lora_B.cpu().contiguous()
            tensors[f"{full}.residual"] = factors.residual.cpu()
    metadata = {_TRANSPOSED: "true"} if transposed else None
    save_file(tensors, out / covariance.block_file(index), metadata)


def is_transposed(files: list[Path]) -> bool:
    """Whether the decomposed layers hold their weights as (in, out), as GPT-2's do."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            if _TRANSPOSED in (file.metadata() or {}):
                return True
    return False


def slice_rank(files: list[Path], rank: int) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The first ``rank`` directions of every layer.

    Args:
        files: factors of all blocks, see :func:`decompose_block`.
        rank: at most the ``max_rank`` of the decomposition.

    Returns:
        layer -> (A, B) in float32, and layer -> its residual curve (R + 1,) float64.

    Raises:
        Mistake: ``rank`` is larger than what was decomposed.
    """
    pairs, curves = {}, {}
    for file in files:
        tensors = load_file(file)
        for key in sorted(tensors):
            if not key.endswith(".lora_A"):
                continue
            layer = key.removesuffix(".lora_A")
            a, b = tensors[key], tensors[f"{layer}.lora_B"]
            if rank > len(a):
                raise Mistake(
                    f"rank {rank} is above what {layer} was decomposed to ({len(a)}): "
                    "raise adapters.<name>.max_rank, or lower the rank where the layer is narrower"
                )
            pairs[layer] = (a[:rank].clone(), b[:, :rank].clone())  # lets go of the rest
            curves[layer] = tensors[f"{layer}.residual"].clone()
    return pairs, curves


def save_curves(path: Path, curves: dict[str, Tensor]) -> None:
    """Write each layer's objective left at every rank (entry 0: without adapter), as JSON."""
    text = json.dumps({layer: curve.tolist() for layer, curve in curves.items()}, sort_keys=True)
    path.write_text(text + "\n")
