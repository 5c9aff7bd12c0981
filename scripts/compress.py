"""Compress a model: by AutoRound, GPTQ, SparseGPT or Wanda, or as somebody else did."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from eora import cli
from eora.result import Result

# What does it: for an existing checkpoint, what its layers are read with.
TOOLS = {"autoround": "auto-round", "existing": "auto-round"}


@dataclass
class Params:
    """Keys: method (autoround, gptq, sparsegpt, wanda or existing); version; but for existing: keep
    (parts of names of layers left in 16 bits).
    For autoround and gptq, and optional after the two that prune: bits, group_size, sym.
    For sparsegpt and wanda: sparsity (2:4, or a share such as 0.5).
    For autoround: iters, batch_size, format (auto_round or auto_gptq), alg_ext, seed, and around
    (what --adapter is, if it is given: compression, adapter, rank, bits).
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
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    out: Annotated[Path, cli.Out],
    tokens: Annotated[
        Path | None, cli.Stage("the tokenize stage (packed); of existing, none")
    ] = None,
    checkpoint: Annotated[Path | None, cli.Stage("the download of an existing checkpoint")] = None,
    adapter: Annotated[Path | None, cli.Stage("an adapter to round around")] = None,
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    taken = spec.method == "existing"
    if taken != (checkpoint is not None) or taken != (tokens is None):
        raise typer.BadParameter("give --checkpoint for the method existing, --tokens for others")
    if (spec.around is not None) != (adapter is not None):
        raise typer.BadParameter("give --adapter where --params has around, and only there")
    result = Result(
        out,
        stage="compress",
        params=vars(spec),
        inputs={
            "model": model,
            "tokens": tokens,
            "checkpoint": checkpoint,
            "adapter": None if adapter is None else adapter / "adapter",
        },
        tools=(
            TOOLS.get(spec.method, "llmcompressor"),
            *(() if spec.method == "autoround" else ("compressed-tensors",)),
            "torch",
            "transformers",
        ),
        kept=store,
    )
    if result.restored():
        return
    notes: dict[str, Any] = {}
    with result.publish(notes) as folder:
        if checkpoint is not None:
            from eora import existing

            notes["weight_error"] = existing.check(
                model / "model", checkpoint / "model", spec.trust_remote_code
            )
            existing.take(checkpoint / "model", folder / "model")
            return
        # llm-compressor takes the first card that it sees.
        where = cli.device(device if spec.method in TOOLS else cli.alone(device))
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


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
