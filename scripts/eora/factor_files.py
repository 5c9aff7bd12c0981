"""Files of nested factors, one a decoder block; one rank is a slice of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eora.adapters import Pair
from eora.errors import Mistake

if TYPE_CHECKING:
    from eora.solver import Factors

_TRANSPOSED = "transposed"


def save(path: Path, layers: dict[str, Factors], transposed: bool) -> None:
    """Write one block's factors.

    The file holds, for each layer, ``.lora_A`` (R, in) float32, ``.lora_B`` (out, R) float32 and
    ``.residual`` (R + 1,) float64, R = min(max_rank, out, in).

    Args:
        path: the file.
        layers: full name -> factors, in host memory.
        transposed: whether the layers hold their weights as (in, out), as GPT-2's do.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in layers.items():
        tensors[f"{name}.lora_A"] = factors.lora_A.contiguous()
        tensors[f"{name}.lora_B"] = factors.lora_B.contiguous()
        tensors[f"{name}.residual"] = factors.residual
    save_file(tensors, path, {_TRANSPOSED: "true"} if transposed else None)


def is_transposed(files: list[Path]) -> bool:
    """What :func:`save` was told of these files' layers."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            if _TRANSPOSED in (file.metadata() or {}):
                return True
    return False


def slice_rank(files: list[Path], rank: int) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The first ``rank`` directions of every layer.

    Args:
        files: factors of all blocks, see :func:`save`.
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
