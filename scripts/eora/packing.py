"""Low-bit adapter folders, in compressed-tensors' packed format.

A folder holds, for each layer, A (r, in) and B^T (r, out) as ``pack-quantized`` tensors:
``weight_packed`` int32, ``weight_scale`` float16 and ``weight_shape``; beside them PEFT's
``adapter_config.json``. B is stored transposed so that its groups run along its long side and no
group mixes two ranks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from eora import adapters

WEIGHTS = "adapter_packed.safetensors"
CONFIG = "quantization_config.json"


def _scheme(bits: int, group_size: int) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits, symmetric=True, strategy="group", group_size=group_size
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _compressor() -> type[BaseCompressor]:
    return BaseCompressor.get_value_from_registry(CompressionFormat.pack_quantized.value)


def pack(matrix: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """Round a matrix (rows, columns) to ``bits`` in groups along its rows, and pack it.

    A group is ``group_size`` columns, or the largest divisor that both sizes share.
    """
    group = math.gcd(matrix.shape[1], group_size)
    scheme = _scheme(bits, group)
    grouped = matrix.float().unflatten(1, (-1, group))
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    state = {"weight": matrix.float(), "weight_scale": scale.half().float()}
    packed = _compressor().compress(state, scheme)
    packed["weight_scale"] = scale.half()
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def unpack(packed: dict[str, Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, columns) that :func:`pack` rounded, in ``dtype``."""
    columns = int(packed["weight_shape"][1])
    group = columns // packed["weight_scale"].shape[1]
    state = packed | {"weight_scale": packed["weight_scale"].to(dtype)}
    return _compressor().decompress(state, _scheme(bits, group))["weight"]


def save(
    folder: Path,
    pairs: dict[str, adapters.Pair],
    bits: int,
    group_size: int,
    base_model: str,
    transposed: bool = False,
) -> None:
    """Write a low-bit adapter folder: packed A and B^T of each layer, and how they were packed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer}.{side}.{name}": tensor
        for layer, (a, b) in pairs.items()
        for side, matrix in (("lora_A", a), ("lora_B_T", b.T))
        for name, tensor in pack(matrix, bits, group_size).items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    rank = len(next(iter(pairs.values()))[0])
    adapters.write_config(folder, rank, pairs, base_model, transposed)
    config = {"format": "pack-quantized", "bits": bits, "group_size": group_size, "symmetric": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> tuple[int, dict[str, dict[str, dict[str, Tensor]]]]:
    """Bits, and layer -> side (``lora_A``, ``lora_B_T``) -> packed tensors."""
    bits = json.loads((folder / CONFIG).read_text())["bits"]
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        layer_side, _, name = key.rpartition(".")
        layer, _, side = layer_side.rpartition(".")
        layers.setdefault(layer, {}).setdefault(side, {})[name] = tensor
    return bits, layers
