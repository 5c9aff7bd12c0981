"""AutoRound (arXiv 2309.05516) on a model folder, through its Python API."""

from __future__ import annotations

import difflib
import gc
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from eora.architectures import dense_weight, linear_layers
from eora.errors import Mistake
from eora.streaming import BlockStream


def check_layers(
    folder: Path, group_size: int, keep: list[str], trust_remote_code: bool = False
) -> None:
    """Refuse settings that do not fit the model's layers, before its weights are read.

    AutoRound passes over a name that matches nothing, and packs groups that a layer is no multiple
    of in a way that cannot be loaded back.

    Args:
        folder: the model.
        group_size: weights that share a scale, along a layer's input; -1 is all of them.
        keep: layers left in 16 bits: parts of their names, or regular expressions.

    Raises:
        Mistake: naming the layer, and what would fit.
    """
    from auto_round.utils import to_standard_regex

    stream = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    widths = {
        name: dense_weight(layer).shape[1] for name, layer in linear_layers(stream.model).items()
    }
    kept: set[str] = set()
    for part in keep:
        try:
            matched = set(filter(re.compile(to_standard_regex(part)).search, widths))
        except ValueError as error:
            raise Mistake(
                f"compressions.<name>.keep: {part!r} is part of no name, and no regular "
                f"expression ({error}); mend or remove it"
            ) from None
        if not matched:
            # Without block numbers, as parts of names are given: mlp.down_proj, down_proj.
            words = {re.sub(r".*\.\d+\.", "", name) for name in widths}
            words |= {word.rpartition(".")[2] for word in words}
            near = difflib.get_close_matches(part, words, n=3) or sorted(words)
            raise Mistake(
                f"compressions.<name>.keep: {part!r} matches no layer of the model; "
                f"mend or remove it. There are {', '.join(near)}"
            )
        kept |= matched
    for name, width in widths.items():
        if group_size > 0 and width % group_size and name not in kept and stream.prefix in name:
            raise Mistake(
                f"compressions.<name>.group_size: {group_size} does not divide the width of "
                f"{name} ({width}); take a smaller one, -1 for whole rows, "
                f"or add {name.rpartition('.')[2]} to keep"
            )


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
        Mistake: see :func:`check_layers`.
    """
    check_layers(folder, group_size, keep, trust_remote_code)
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
