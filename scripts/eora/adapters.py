"""16-bit adapter folders, in PEFT's LoRA format.

``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT saves and loads them; alpha = r,
so the product is used unscaled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

Pair = tuple[Tensor, Tensor]  # lora_A (r, in), lora_B (out, r)


def _narrower(ranks: Mapping[str, int]) -> dict[str, int]:
    """PEFT's ``rank_pattern``: layers whose rank is not the largest. By the last part of their
    names where all layers of that kind have one rank."""
    kinds: dict[str, set[int]] = {}
    for layer, rank in ranks.items():
        kinds.setdefault(layer.rpartition(".")[2], set()).add(rank)
    largest = max(ranks.values())
    found = {}
    for layer, rank in ranks.items():
        kind = layer.rpartition(".")[2]
        if rank < largest:
            found[kind if len(kinds[kind]) == 1 else layer] = rank
    return found


def write_config(folder: Path, ranks: Mapping[str, int], base_model: str, transposed: bool) -> None:
    """Write PEFT's ``adapter_config.json``; what is not in it is as PEFT has it by default.

    By hand: to import PEFT for it takes longer than all else that makes a small model's adapter.

    Args:
        folder: of the adapter.
        ranks: layer -> its rank.
        base_model, transposed: see :func:`save_peft`.
    """
    rank, narrower = max(ranks.values()), _narrower(ranks)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        **({"rank_pattern": narrower, "alpha_pattern": narrower} if narrower else {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_peft(
    folder: Path, pairs: dict[str, Pair], base_model: str, transposed: bool = False
) -> None:
    """Write a PEFT LoRA folder in float16.

    Args:
        folder: created if missing.
        pairs: layer name in the model (``model.layers.0.mlp.up_proj``) -> (A, B); ranks may differ.
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
    ranks = {layer: len(a) for layer, (a, _) in pairs.items()}
    write_config(folder, ranks, base_model, transposed)


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
