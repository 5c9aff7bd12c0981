"""Collect the second moments of one shard of decoder blocks, from the original model or from a
compressed one."""

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from safetensors import serialize_file

from eora import cli
from eora.result import Result

log = logging.getLogger(__name__)


@dataclass
class Params:
    """Keys: shard and shards (this is shard k of K, of blocks kL/K to (k+1)L/K); expert_tokens
    (an expert that saw fewer is filled up with average ones); tf32 (a GPU may round float32 inputs
    of products to 10 bits); version."""

    expert_tokens: int
    shard: int
    shards: int
    version: int
    tf32: bool = False
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage, or its compress stage")],
    tokens: Annotated[Path, cli.Stage("the tokenize stage")],
    out: Annotated[Path, cli.Out],
    hidden: Annotated[
        Path | None, typer.Option(help="hidden.safetensors of the shard before; none for shard 0.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch; changes no result.")] = 8,
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    # The hidden states are handed to the next shard and then deleted.
    handed_on = "hidden.safetensors"
    result = Result(
        out,
        stage="covariance",
        params=vars(spec),
        inputs={"model": model, "tokens": tokens},
        tools=("torch", "transformers"),
        passing=(handed_on,),
        kept=store,
    )
    if result.restored():
        # They are not kept. Should the next shard be computed all the same, it starts from the
        # samples: an empty file says so.
        serialize_file({}, out / handed_on)
        return
    # Or pinned memory would come in powers of two: hidden states of 17 GB would take 32.
    pinned = "pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", pinned)
    where = cli.device(device)
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from eora import architectures, block_files, covariance, shapes, streaming

    torch.backends.cuda.matmul.allow_tf32 = spec.tf32
    notes: dict = {}
    with result.publish(notes) as folder:
        stream = streaming.BlockStream(
            model / "model",
            where,
            streaming.compute_dtype(model / "model", where),
            spec.trust_remote_code,
        )
        blocks = shapes.shard_range(spec.shard, spec.shards, len(stream))
        data = load_file(tokens / "tokens.safetensors")
        batches = covariance.batches(data["input_ids"], data["lengths"], batch_size)
        given = {} if hidden is None else load_file(hidden)
        moments = folder / "moments"
        moments.mkdir()

        def save(index: int, block: covariance.BlockMoments) -> None:
            moe = architectures.experts(stream.blocks[index])
            few = covariance.fill_experts(block, moe, spec.expert_tokens)
            for expert, tokens in few.items():
                notes.setdefault("filled_experts", {})[f"{stream.name(index)}.{expert}"] = tokens
            if few:
                log.warning(
                    "%s: %d experts saw fewer than %d tokens (%s): filled up with average ones",
                    stream.name(index),
                    len(few),
                    spec.expert_tokens,
                    ", ".join(f"{expert}: {tokens}" for expert, tokens in few.items()),
                )
            covariance.save_moments(moments / block_files.name(index), block)

        with tempfile.TemporaryDirectory(dir=folder) as spill:
            after = covariance.run_shard(
                stream,
                blocks,
                batches,
                given.get("hidden"),
                Path(spill),
                save,
                lambda indices: tqdm(indices, desc="blocks", unit="block"),
            )
            last = blocks.stop == len(stream)
            save_file({} if last else {"hidden": after}, folder / handed_on)


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
