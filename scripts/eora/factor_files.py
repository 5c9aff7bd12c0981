"""Files of nested factors, one a decoder block; one rank is a slice of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eora.adapters import Pair
from eora.errors import Mistake

if TYPE_CHECKING:
    from eora.solver import Factors

_TRANSPOSED = "transposed"


def save(path: Path, layers: dict[str, Factors], transposed: bool) -> None:
    """Write one block's factors.

    The file holds, for each layer, ``.lora_A`` (R, in) float32, ``.lora_B`` (out, R) float32,
    ``.residual`` (R + 1,) float64, R = min(max_rank, out, in), ``.channels`` (in,) float32, and
    ``.cross`` (R, in) in bfloat16, as it only tells what a rounding error weighs.

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
        tensors[f"{name}.cross"] = factors.cross.bfloat16()
        tensors[f"{name}.channels"] = factors.channels.float()
    save_file(tensors, path, {_TRANSPOSED: "true"} if transposed else None)


def is_transposed(files: list[Path]) -> bool:
    """What :func:`save` was told of these files' layers."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            if _TRANSPOSED in (file.metadata() or {}):
                return True
    return False


def slice_rank(files: list[Path], rank: int) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The first ``rank`` directions of every layer; of a narrower layer, all.

    Args:
        files: factors of all blocks, see :func:`save`.
        rank: at most the ``max_rank`` of the decomposition.

    Returns:
        layer -> (A, B) in float32, and layer -> its residual curve (R + 1,) float64.

    Raises:
        Mistake: ``rank`` is larger than what was decomposed.
    """
    pairs, curves = {}, {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                if not key.endswith(".lora_A"):
                    continue
                layer = key.removesuffix(".lora_A")
                a, b = file.get_slice(key), file.get_slice(f"{layer}.lora_B")
                have, width = a.get_shape()
                if have < min(rank, width, b.get_shape()[0]):
                    raise Mistake(
                        f"rank {rank} is above what {layer} was decomposed to ({have}): raise "
                        "adapters.<name>.max_rank"
                    )
                pairs[layer] = (a[:rank], b[:, :rank].contiguous())
                curves[layer] = file.get_tensor(f"{layer}.residual")
    return pairs, curves


def save_moments(path: Path, files: list[Path], rank: int) -> None:
    """Write what rounding must know of each layer's inputs: ``.cross`` (rank, in), ``.channels``
    (in,); see :class:`eora.solver.Factors`.

    Args:
        path: the file.
        files, rank: as for :func:`slice_rank`.
    """
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as block:
            for key in sorted(block.keys()):
                if key.endswith(".cross"):
                    tensors[key] = block.get_slice(key)[:rank]
                elif key.endswith(".channels"):
                    tensors[key] = block.get_tensor(key)
    save_file(tensors, path)


class InputMoments:
    """What :func:`save_moments` wrote, read as it is asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")

    def of(self, layer: str) -> tuple[Tensor, Tensor]:
        """``cross`` (rank, in) and ``channels`` (in,) of one layer."""
        return self._file.get_tensor(f"{layer}.cross"), self._file.get_tensor(f"{layer}.channels")


def save_curves(path: Path, curves: dict[str, Tensor]) -> None:
    """Write each layer's objective left at every rank (entry 0: without adapter), as JSON."""
    text = json.dumps({layer: curve.tolist() for layer, curve in curves.items()}, sort_keys=True)
    path.write_text(text + "\n")
