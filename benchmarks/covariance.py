"""The covariance pass against a plain forward pass, and against the least that it can take."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import common
from common import CALIBRATION, MODEL, Target
from eora import architectures, block_files, covariance, streaming


def ours(folder: Path, data: list[covariance.Batch]) -> None:
    """All second moments, from weights on disk to files, as scripts/covariance.py makes them."""
    stream = streaming.BlockStream(folder, "cpu", streaming.compute_dtype(folder, "cpu"))
    with tempfile.TemporaryDirectory(dir=common.PLACE) as place:
        out = Path(place)
        covariance.run_shard(
            stream,
            range(len(stream)),
            data,
            None,
            out,
            lambda i, block: covariance.save_moments(out / block_files.name(i), block),
        )


@torch.inference_mode()
def forward(model: torch.nn.Module, data: list[covariance.Batch]) -> None:
    """All batches through a model that is in memory."""
    for batch in data:
        model(input_ids=batch.input_ids, use_cache=False)


def widths(model: PreTrainedModel) -> list[int]:
    """The width of each distinct input of linear layers in the decoder."""
    found: list[Tensor] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if not any(args[0] is other for other in found):
            found.append(args[0])

    _, blocks = architectures.decoder_blocks(model)
    layers = [layer for block in blocks for layer in architectures.linear_layers(block).values()]
    hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    for one in hooks:
        one.remove()
    return [x.shape[-1] for x in found]


def products(inputs: dict[int, Tensor]) -> dict[int, float]:
    """Seconds of one full product x^T x for each width, the best of three."""
    return {width: min(timed(lambda x=x: x.T @ x) for _ in range(3)) for width, x in inputs.items()}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    samples: common.Samples = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is run, in turns.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Samples a batch, of all that is run.")] = 8,
    json_file: common.Json = None,
) -> None:
    """Time the covariance pass of SmolLM2-135M over 64 x 512 tokens, and what bounds it, in turns.

    \b
    pass      ours, from weights on disk to second moments on disk
    forward   the whole model, in memory, on the same batches: a plain forward pass
    decoder   the same without the head, which the pass does not need
    products  x^T x of each distinct input, all of it, by this machine's matrix multiplication
    floor     decoder + half of the products: as second moments are symmetric, no pass does less

    All compute in bfloat16, as the model is stored, or in float32 where the CPU has no units for
    it; products in float32. Medians; the products are timed on matrices of one batch's own shapes.
    About ten minutes on two cores.
    """
    common.prepare(samples)
    folder = common.result("download_model", model=MODEL) / "model"
    tokens = load_file(
        common.result("tokenize", model=MODEL, calibration=CALIBRATION) / "tokens.safetensors"
    )
    data = covariance.batches(tokens["input_ids"], tokens["lengths"], batch_size)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=streaming.compute_dtype(folder, "cpu") or torch.bfloat16
    ).eval()
    count = int(tokens["lengths"].sum())
    rows = data[0].input_ids.numel()
    read = widths(model)
    inputs = {width: torch.randn(rows, width) for width in sorted(set(read))}

    times: dict[str, list[float]] = {name: [] for name in ("pass", "forward", "decoder")}
    parts: list[dict[int, float]] = []
    for turn in range(repeats):
        times["pass"].append(timed(lambda: ours(folder, data)))
        times["forward"].append(timed(lambda: forward(model, data)))
        times["decoder"].append(timed(lambda: forward(model.base_model, data)))
        parts.append(products(inputs))
        told = ", ".join(f"{name} {some[-1]:.1f} s" for name, some in times.items())
        typer.echo(f"turn {turn + 1} of {repeats}: {told}")

    took = {name: statistics.median(some) for name, some in times.items()}
    seconds = {width: statistics.median(part[width] for part in parts) for width in inputs}
    # n (n + 1) of the 2 n^2 operations of a full product, for each token.
    took["products"] = sum(seconds[width] for width in read) * count / rows
    half = sum(seconds[w] * (w + 1) / (2 * w) for w in read) * count / rows
    took["floor"] = took["decoder"] + half
    rates = {width: 2 * width**2 * rows / second / 1e9 for width, second in seconds.items()}
    typer.echo(f"\n{len(read)} distinct inputs, {count:,} tokens in batches of {rows:,}")
    typer.echo(
        "matrix rate: "
        + ", ".join(f"{rate:.0f} GFLOP/s at width {width}" for width, rate in rates.items())
    )
    for name, second in took.items():
        typer.echo(f"{name:<9} {second:8.2f} s   pass / {name:<9} {took['pass'] / second:6.2f}")
    common.conclude(
        [Target("covariance pass, times the floor", took["pass"] / took["floor"], most=1.25)],
        {"seconds": took, "all seconds": times, "GFLOP/s": rates, "tokens": count},
        json_file,
    )


if __name__ == "__main__":
    typer.run(main)
