"""Adapter folders: PEFT's LoRA format in 16 bits, and compressed-tensors' packed form of it.

A 16-bit folder is what PEFT saves (``adapter_config.json``, ``adapter_model.safetensors``;
alpha = r, so the product is used unscaled). A low-bit folder holds, for each layer, A (r, in) and
B^T (r, out) as compressed-tensors ``pack-quantized`` tensors: ``weight_packed`` int32,
``weight_scale`` float16 and ``weight_shape``. B is stored transposed so that its groups run along
its long side and no group mixes two ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PACKED_WEIGHTS = "adapter_packed.safetensors"
PACKED_CONFIG = "quantization_config.json"
_PREFIX = "base_model.model."

Pair = tuple[Tensor, Tensor]  # lora_A (r, in), lora_B (out, r)


def _write_config(
    folder: Path, rank: int, layers: Iterable[str], base_model: str, transposed: bool
) -> None:
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        base_model_name_or_path=base_model,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
    # PEFT keeps target_modules in a set: its order in the file changes from run to run.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_peft(
    folder: Path, pairs: dict[str, Pair], rank: int, base_model: str, transposed: bool = False
) -> None:
    """Write a PEFT LoRA folder in float16.

    Args:
        folder: created if missing.
        pairs: layer name in the model (``model.layers.0.mlp.up_proj``) -> (A, B).
        base_model: where the base model comes from, for the adapter's card.
        transposed: the base model's layers hold their weights as (in, out), as GPT-2's do; PEFT
            wants to be told, though (A, B) are the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, (a, b) in pairs.items():
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a.half().contiguous()
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b.half().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    _write_config(folder, rank, pairs, base_model, transposed)


def is_transposed(folder: Path) -> bool:
    """What an adapter folder was saved with, see :func:`save_peft`."""
    return json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]


def load_peft(folder: Path) -> dict[str, Pair]:
    """Layer name -> (A, B) of a PEFT LoRA folder, in the file's dtype."""
    tensors = load_file(folder / WEIGHTS)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {
        layer.removeprefix(_PREFIX): (
            tensors[f"{layer}.lora_A.weight"],
            tensors[f"{layer}.lora_B.weight"],
        )
        for layer in layers
    }


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


def save_packed(
    folder: Path,
    pairs: dict[str, Pair],
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
    save_file(tensors, folder / PACKED_WEIGHTS, {"format": "pt"})
    rank = len(next(iter(pairs.values()))[0])
    _write_config(folder, rank, pairs, base_model, transposed)
    config = {"format": "pack-quantized", "bits": bits, "group_size": group_size, "symmetric": True}
    (folder / PACKED_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_packed(folder: Path) -> tuple[int, dict[str, dict[str, dict[str, Tensor]]]]:
    """Bits, and layer -> side (``lora_A``, ``lora_B_T``) -> packed tensors."""
    bits = json.loads((folder / PACKED_CONFIG).read_text())["bits"]
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load_file(folder / PACKED_WEIGHTS).items():
        layer_side, _, name = key.rpartition(".")
        layer, _, side = layer_side.rpartition(".")
        layers.setdefault(layer, {}).setdefault(side, {})[name] = tensor
    return bits, layers
