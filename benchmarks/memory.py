"""Peak memory of the covariance stage on a model of 4 billion random weights."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

import common
from common import CALIBRATION, MODEL, PLACE, Target
from eora import manifest

# Shapes of a 4B model of the Qwen3 family.
SHAPES = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def make(out: Path, layers: int, samples: int, seqlen: int) -> int:
    """Write a model of random bfloat16 weights, a file a decoder block, and random tokens.

    In a process of its own (see :func:`common.run`); it never holds more than the embeddings.

    Returns:
        Bytes of weights.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3Config

    generator = torch.Generator().manual_seed(0)
    config = Qwen3Config(**SHAPES, num_hidden_layers=layers, max_position_embeddings=4096)
    config.architectures = ["Qwen3ForCausalLM"]
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    folder = out / "model" / "model"
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    files: dict[str, list[str]] = {}
    for name in shapes:
        if name != "lm_head.weight":  # the embeddings
            block = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "outside"
            files.setdefault(f"model-{block}.safetensors", []).append(name)
    total = 0
    for file, names in files.items():
        tensors = {
            name: torch.ones(shapes[name].shape, dtype=torch.bfloat16)
            if shapes[name].ndim == 1  # norms
            else torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(
                std=0.02, generator=generator
            )
            for name in names
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.randint(SHAPES["vocab_size"], (samples, seqlen), generator=generator)
    lengths = torch.full((samples,), seqlen, dtype=torch.int32)
    (out / "tokens").mkdir()
    save_file({"input_ids": tokens.int(), "lengths": lengths}, out / "tokens/tokens.safetensors")
    # The stage wants finished results; gigabytes of random weights need no digests.
    for name in ("model", "tokens"):
        (out / name / manifest.NAME).write_text(json.dumps({"outputs": {}}))
    return total


def main(
    layers: Annotated[int, typer.Option(min=1, help="Decoder blocks; fewer to try it out.")] = 36,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 4,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens a sample.")] = 128,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the model and its moments.")] = False,
    json_file: common.Json = None,
) -> None:
    """Measure the covariance stage's memory on a random model of Qwen3-4B's shapes (8 GB).

    The model is written to disk block by block, and the stage's own script runs on it, so that
    what counts is what a user's run takes. Memory does not follow the model's size: it is that of
    one block and its second moments, whatever --layers says.

    Two figures: all that is resident at once, which the target is for and which includes those
    pages of the weights' files that are mapped just then; and what of it no file backs.

    Takes up to 30 GB of disk below .cache/bench, freed at the end, and about five minutes.
    """
    place = PLACE / "random-4b"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        typer.echo(f"writing a random model of {layers} blocks ...")
        # Spawned, so that this process keeps torch out of itself.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            size = pool.submit(make, place, layers, samples, seqlen).result()
        typer.echo(f"  {size / 1e9:.1f} GB; its covariance pass ...")
        config = common.load()
        cost = common.stage(
            config,
            "covariance",
            place / "moments",
            ["--model", place / "model", "--tokens", place / "tokens", "--batch-size", samples],
            model=MODEL,
            calibration=CALIBRATION,
            shard=0,
            shards=1,
        )
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    typer.echo(
        f"\n{size / 1e9:.1f} GB of weights, {samples} x {seqlen} tokens: {cost.wall:.0f} s, "
        f"peak {common.megabytes(cost.peak)}, {common.megabytes(cost.anonymous)} of it anonymous"
    )
    name = f"memory of the pass over {size / 2e9:.1f}B weights"
    common.conclude(
        [Target(name, cost.peak / 1e9, most=3, unit="GB")],
        {
            "weight bytes": size,
            "tokens": samples * seqlen,
            "seconds": cost.wall,
            "peak bytes": cost.peak,
            "anonymous bytes": cost.anonymous,
        },
        json_file,
    )


if __name__ == "__main__":
    typer.run(main)
