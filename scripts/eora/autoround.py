"""AutoRound (arXiv 2309.05516) on a model folder, through its Python API; if wanted, around an
adapter.

Around an adapter B A, each layer's W - B A is rounded, with the adapter beside it in the block
whose output AutoRound keeps near the original's: rounding learns what the adapter leaves to it,
and what it costs to hold the adapter in few bits. What is saved is W - B A in few bits, a model
that is of no use without an adapter; one is fitted to its error against W as to any other's.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eora import layers
from eora.loading import load_original
from eora.lowrank import Factors, LowRankLinear, load_factors
from eora.streaming import INDEX, BlockStream


def put_beside(model: nn.Module, adapter: Path, rounded: set[str]) -> list[str]:
    """Split each layer that is rounded into W - B A and B A beside it, in place.

    In sum the layer is what it was, but for rounding W - B A to the layer's dtype.

    Args:
        model: the original.
        adapter: 16-bit or packed; packed factors are unpacked once, as all steps use them.
        rounded: full names of the layers that are; others stay as they are.

    Returns:
        The names of those layers.
    """
    found = {n: f for n, f in load_factors(adapter).items() if n in rounded}
    for name, factors in found.items():
        layer = model.get_submodule(name)
        a, b = factors.matrices(torch.float32)
        layer.weight.data = (layer.weight.float() - b @ a).to(layer.weight.dtype)
        dtype = layer.weight.dtype
        model.set_submodule(name, LowRankLinear(layer, Factors(a.to(dtype), b.to(dtype))))
    return list(found)


def take_apart(folder: Path, beside: list[str]) -> None:
    """Make a saved model of :func:`put_beside` one whose layers have their own names and no
    adapter, in place.

    Args:
        folder: as transformers saves models, in one file or several.
        beside: the layers that have an adapter.
    """
    own = {f"{name}.base": name for name in beside}
    factors = {f"{name}.factors" for name in beside}

    def renamed(names: Iterable[str]) -> dict[str, str]:
        split = {name: name.rpartition(".")[::2] for name in names}
        return {
            name: f"{own[layer]}.{last}" if layer in own else name
            for name, (layer, last) in split.items()
            if layer not in factors
        }

    size = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        own_named = {new: tensors[name] for name, new in renamed(tensors).items()}
        save_file(own_named, file, {"format": "pt"})
        size += sum(tensor.nbytes for tensor in own_named.values())
    index = folder / INDEX
    if index.is_file():
        told = json.loads(index.read_text())
        places = told["weight_map"]
        told["weight_map"] = {new: places[name] for name, new in renamed(places).items()}
        told["metadata"] = told.get("metadata", {}) | {"total_size": size}
        index.write_text(json.dumps(told, indent=2) + "\n")
    for file in (folder / "config.json", folder / "quantization_config.json"):
        text = file.read_text()
        for name in filter(text.__contains__, own):  # layers with settings of their own
            text = text.replace(name, own[name])
        told = json.loads(text)
        for stored in (told, told.get("quantization_config", {})):
            # GPTQ's format lists them by their names within a block.
            key = "modules_in_block_to_quantize"
            if stored.get(key):
                stored[key] = [[n.removesuffix(".base") for n in some] for some in stored[key]]
        file.write_text(json.dumps(told, indent=2) + "\n")


def quantize(
    folder: Path,
    out: Path,
    input_ids: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    iters: int,
    batch_size: int,
    format: str,
    alg_ext: bool,
    keep: list[str],
    seed: int,
    device: str,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Quantize the decoder's linear layers and save a folder that transformers loads.

    Args:
        folder: the original model.
        out: the folder to make.
        input_ids: (samples, seqlen) calibration tokens, every sample full.
        bits, group_size, sym, iters, batch_size, seed: as AutoRound means them.
        format: ``auto_round`` or ``auto_gptq``.
        alg_ext: AutoRound's extended algorithm.
        keep: layers left in 16 bits: parts of their names.
        device: cpu, cuda or cuda:N.
        adapter: an adapter of the original model to round around, 16-bit or packed.

    Raises:
        Mistake: the settings do not fit the model's layers.
    """
    skeleton = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    rounded = set(layers.chosen(skeleton, group_size, keep))
    if adapter is not None:
        layers.check_plain(skeleton, "compressions.<name>.around")
    from auto_round import AutoRound

    model, tokenizer = load_original(folder, trust_remote_code)
    if adapter is not None:
        beside = put_beside(model, adapter, rounded)
    # AutoRound takes a list of batches in place of a data set's name: nothing is downloaded.
    data: list[dict[str, Any]] = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in input_ids.long().split(batch_size)
    ]
    # AutoRound collects garbage several times a block, which on a small model takes a third of the
    # time: keep it from walking through all imported modules each time.
    gc.freeze()
    scratch = out.parent / "autoround"
    rounder = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group_size,
        sym=sym,
        iters=iters,
        nsamples=len(input_ids),
        seqlen=input_ids.shape[1],
        batch_size=min(batch_size, len(input_ids)),
        dataset=data,
        enable_alg_ext=alg_ext,
        # On CUDA as AutoRound decides; compiling for a CPU costs more than it saves.
        enable_torch_compile=None if device.startswith("cuda") else False,
        layer_config={name: {"bits": 16} for name in keep} or None,
        device_map=device,
        seed=seed,
    )
    _, folders = rounder.quantize_and_save(str(scratch), format=format)
    saved = Path(folders[0] if isinstance(folders, list | tuple) else folders)
    if adapter is not None:
        take_apart(saved, beside)
    saved.rename(out)
    shutil.rmtree(scratch, ignore_errors=True)
