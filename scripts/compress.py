"""Compress a model: by AutoRound, GPTQ, AWQ, SparseGPT or Wanda, or as somebody else did; or fit
the scales of a compressed one anew."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from eora import cli
from eora.result import Result

# What does it; of what is compressed already, what its layers are read with.
READING = ("auto-round", "compressed-tensors")
TOOLS = {"autoround": ("auto-round",), "existing": READING, "rescale": READING}
ONE_SHOT = ("llmcompressor", "compressed-tensors")
# The stages that a method starts from beside the model, but for those that calibrate: tokens.
STAGES = {"existing": {"checkpoint"}, "rescale": {"compressed", "moments"}}


@dataclass
class Params:
    """Keys: method (autoround, gptq, awq, sparsegpt, wanda, existing or rescale); version; of those
    that calibrate: keep (parts of names of layers left in 16 bits).
    For autoround, gptq and awq, and optional after the two that prune: bits, group_size, sym.
    For sparsegpt and wanda: sparsity (2:4, or a share such as 0.5).
    For autoround: iters, batch_size, format (auto_round or auto_gptq), alg_ext, seed, and around
    (what --adapter is, if it is given: compression, adapter, rank, bits).
    For rescale: compression (what --compressed is), rank (of the adapter that scales are fitted
    beside) and rounds (how often).
    The number of samples and their length are those of --tokens."""

    method: str
    version: int
    keep: list | None = None
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    sparsity: str | None = None
    iters: int | None = None
    batch_size: int | None = None
    format: str | None = None
    alg_ext: bool | None = None
    seed: int | None = None
    around: dict | None = None
    compression: str | None = None
    rank: int | None = None
    rounds: int | None = None
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    out: Annotated[Path, cli.Out],
    tokens: Annotated[
        Path | None, cli.Stage("the tokenize stage (packed), for what calibrates")
    ] = None,
    checkpoint: Annotated[Path | None, cli.Stage("the download of an existing checkpoint")] = None,
    adapter: Annotated[Path | None, cli.Stage("an adapter to round around")] = None,
    compressed: Annotated[Path | None, cli.Stage("the compress stage to rescale")] = None,
    moments: Annotated[
        list[Path] | None, cli.Stage("the covariance stage's shards, to rescale in; once for each")
    ] = None,
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    shards = moments or []
    stages = {
        "tokens": tokens,
        "checkpoint": checkpoint,
        "adapter": adapter,
        "compressed": compressed,
        "moments": shards,
    }
    needed = STAGES.get(spec.method, {"tokens"}) | ({"adapter"} if spec.around else set())
    if needed != {name for name, given in stages.items() if given}:
        raise typer.BadParameter(
            f"{spec.method} {'around an adapter ' if spec.around else ''}starts from "
            f"{' and '.join(f'--{name}' for name in sorted(needed))}; give that, and no other stage"
        )
    result = Result(
        out,
        stage="compress",
        params=vars(spec),
        inputs={
            "model": model,
            "tokens": tokens,
            "checkpoint": checkpoint,
            "adapter": None if adapter is None else adapter / "adapter",
            "compressed": compressed,
            **{f"moments_{i}": shard for i, shard in enumerate(shards)},
        },
        tools=(*TOOLS.get(spec.method, ONE_SHOT), "torch", "transformers"),
        kept=store,
    )
    if result.restored():
        return
    notes: dict[str, Any] = {}
    with result.publish(notes) as folder:
        if checkpoint is not None:
            from eora import existing, smoothing

            existing.take(checkpoint / "model", folder / "model", spec.trust_remote_code)
            notes["weight_error"], scales = existing.check(
                model / "model", folder / "model", spec.trust_remote_code, checkpoint / "model"
            )
            if scales:
                smoothing.save(folder / smoothing.NAME, scales)
            return
        if compressed is not None:
            notes["output_error"] = _rescale(
                spec, model, compressed, shards, folder, cli.device(device)
            )
            return
        # llm-compressor takes the first card that it sees.
        where = cli.device(device, alone=spec.method not in TOOLS)
        from safetensors.torch import load_file

        data = load_file(tokens / "tokens.safetensors")["input_ids"]
        given = {
            key: value
            for key, value in vars(spec).items()
            if value is not None and key not in ("method", "version", "around")
        }
        if spec.method == "autoround":
            from eora import autoround

            autoround.quantize(
                model / "model",
                folder / "model",
                data,
                device=where,
                adapter=None if adapter is None else adapter / "adapter",
                **given,
            )
        else:
            from eora import oneshot

            oneshot.compress(model / "model", folder / "model", data, method=spec.method, **given)


def _rescale(
    spec: Params, model: Path, compressed: Path, shards: list[Path], out: Path, device: str
) -> dict[str, float]:
    """Copy the compressed model with other scales; each block's share of the error that is left."""
    from tqdm import tqdm

    from eora import block_files, rescaling, smoothing
    from eora.streaming import BlockStream

    files = {file.name: file for shard in shards for file in block_files.listed(shard / "moments")}
    original, rounded = (
        BlockStream(stage / "model", device, trust_remote_code=spec.trust_remote_code)
        for stage in (model, compressed)
    )
    hidden = shutil.ignore_patterns(".*")  # such as Snakemake's time stamps
    copy = out / "model"
    shutil.copytree(compressed / "model", copy, ignore=hidden, copy_function=shutil.copyfile)
    if (scales := compressed / smoothing.NAME).is_file():
        shutil.copyfile(scales, out / smoothing.NAME)
    return rescaling.rescale(
        original,
        rounded,
        lambda index: files[block_files.name(index)],
        smoothing.Smoothing(compressed),
        copy,
        spec.rank,
        spec.rounds,
        lambda blocks: tqdm(blocks, desc="blocks", unit="block"),
    )


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
