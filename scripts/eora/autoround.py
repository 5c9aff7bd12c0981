"""AutoRound (arXiv 2309.05516) on a model folder, through its Python API."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from eora import layers
from eora.streaming import BlockStream


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

    Raises:
        Mistake: the settings do not fit the model's layers.
    """
    skeleton = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    layers.chosen(skeleton, group_size, keep)
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
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
    saved.rename(out)
    shutil.rmtree(scratch, ignore_errors=True)
