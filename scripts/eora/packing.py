"""Low-bit adapter folders, in compressed-tensors' packed format.

A folder holds, for each layer, A (r, in) and B^T (r, out) as ``pack-quantized`` tensors:
``weight_packed`` int32, ``weight_scale`` float16 and ``weight_shape``; beside them PEFT's
``adapter_config.json``. B is stored transposed so that its groups run along its long side and no
group mixes two ranks. ``weight_shape`` is the matrix's own: where groups do not divide its columns,
the last one is filled up with zeros in ``weight_packed``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from eora import adapters
from eora.rounding import Rounded, grouped, width

Packed = Mapping[str, Tensor | tuple[int, int]]

WEIGHTS = "adapter_packed.safetensors"
CONFIG = "quantization_config.json"


@cache
def _scheme(bits: int, group_size: int) -> QuantizationScheme:
    """Kept, as checking one takes longer than unpacking a small matrix by it."""
    weights = QuantizationArgs(
        num_bits=bits, symmetric=True, strategy="group", group_size=group_size
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _compressor() -> type[BaseCompressor]:
    return BaseCompressor.get_value_from_registry(CompressionFormat.pack_quantized.value)


def pack(rounded: Rounded, bits: int, group_size: int) -> dict[str, Tensor]:
    """Pack a matrix (rows, columns) that lies on its grid.

    Args:
        rounded: see :func:`eora.rounding.nearest`.
        bits, group_size: what it was rounded to.
    """
    groups = grouped(rounded.values, group_size)
    state = {"weight": groups.flatten(1), "weight_scale": rounded.scale.float()}
    packed = _compressor().compress(state, _scheme(bits, groups.shape[2]))
    packed["weight_scale"] = rounded.scale
    packed["weight_shape"] = torch.tensor(rounded.values.shape)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def unpack(packed: Packed, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, columns) that :func:`pack` packed, in ``dtype``.

    Its ``weight_shape`` may be a pair of numbers: of a tensor on a GPU, reading it would wait for
    all that the GPU has yet to do.
    """
    rows, columns = map(int, packed["weight_shape"])
    group = width(columns, group_size)
    scale = packed["weight_scale"].to(dtype)
    if 32 % bits:
        filled = (rows, scale.shape[1] * group)
        state = packed | {"weight_scale": scale, "weight_shape": filled}
        return _compressor().decompress(state, _scheme(bits, group))["weight"][:, :columns]
    # Of words that hold whole values, in a third of compressed-tensors' steps: a model that
    # writes text takes them for every layer and token.
    words = packed["weight_packed"]
    values = words[..., None] >> torch.arange(0, 32, bits, device=words.device, dtype=words.dtype)
    values.bitwise_and_(2**bits - 1).sub_(2 ** (bits - 1))
    values = values.flatten(1)[:, : scale.shape[1] * group].unflatten(1, (-1, group))
    return (values * scale[..., None]).flatten(1)[:, :columns]


def save(
    folder: Path,
    layers: Iterable[tuple[str, Rounded, Rounded]],
    bits: int,
    group_size: int,
    base_model: str,
    transposed: bool = False,
) -> None:
    """Write a low-bit adapter folder: packed A and B^T of each layer, and how they were packed.

    Args:
        folder: created if missing.
        layers: name, A (r, in) and B^T (r, out) of each layer; packed as they come.
        bits, group_size: what they were rounded to.
        base_model, transposed: see :func:`eora.adapters.save_peft`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    for layer, a, b_t in layers:
        ranks[layer] = len(a.values)
        for side, rounded in (("lora_A", a), ("lora_B_T", b_t)):
            for name, tensor in pack(rounded, bits, group_size).items():
                tensors[f"{layer}.{side}.{name}"] = tensor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    adapters.write_config(folder, ranks, base_model, transposed)
    config = {"format": "pack-quantized", "bits": bits, "group_size": group_size, "symmetric": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> tuple[int, int, dict[str, dict[str, dict[str, Tensor]]]]:
    """Bits, group size, and layer -> side (``lora_A``, ``lora_B_T``) -> packed tensors."""
    config = json.loads((folder / CONFIG).read_text())
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        layer_side, _, name = key.rpartition(".")
        layer, _, side = layer_side.rpartition(".")
        layers.setdefault(layer, {}).setdefault(side, {})[name] = tensor
    return config["bits"], config["group_size"], layers
