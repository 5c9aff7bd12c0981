"""Research: the scales of a rounded model refitted in closed form around an adapter.

Its integers stay as they are. Perplexity without, and after each round; see docs/research.md.

With q a row's integers less their zero points, in groups that share a scale, and s the scales, the
row of the error W - B A - s q is least in the metric C where (P C P^T) s = P C (W - B A)^T, P being
q spread out, a row a group. Then the adapter is fitted to the new error, and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

import common  # noqa: F401 - puts scripts/ on the path
from eora import block_files, covariance, evaluation, loading, text
from eora.solver import Metric, decompose

# Share of the mean diagonal that is added to it: some groups hardly matter.
RIDGE = 1e-4


def refit(target: Tensor, integers: Tensor, moment: Tensor) -> Tensor:
    """Scales s that bring ``s * integers`` closest to a target in the metric of a second moment.

    Args:
        target: (out, in) float32.
        integers: (out, groups, group_size) float32.
        moment: (in, in) float32.

    Returns:
        (out, groups), rounded to float16 as they are stored.
    """
    rows, groups, size = integers.shape
    flat = integers.reshape(rows, -1)
    right = (flat * (target @ moment)).view(rows, groups, size).sum(2)
    left = torch.empty(rows, groups, groups, dtype=torch.float64)
    for i in range(groups):
        product = integers[:, i] @ moment[i * size : (i + 1) * size]
        left[:, i] = (product * flat).view(rows, groups, size).sum(2)
    mean = left.diagonal(dim1=1, dim2=2).mean(1)
    left += RIDGE * mean[:, None, None] * torch.eye(groups, dtype=torch.float64) + 1e-12
    return torch.linalg.solve(left, right.double()[..., None])[..., 0].half().float()


@torch.no_grad()
def main(
    model: Annotated[str, typer.Argument(help="A model of the results.")],
    compression: Annotated[str, typer.Argument(help="Its compression, in AutoRound's format.")],
    calibration: Annotated[str, typer.Argument(help="What its second moments were taken on.")],
    dataset: Annotated[str, typer.Argument(help="The data set to judge by.")],
    results: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
    column: Annotated[str, typer.Option(help="The data set's column of text.")] = "text",
    rank: Annotated[int, typer.Option(help="The adapter's rank; 0 for none.")] = 128,
    rounds: Annotated[int, typer.Option(help="Times that scales and adapter are refitted.")] = 4,
) -> None:
    original, tokenizer = loading.load(results / "models" / model / "model")
    folder = results / "compressed" / model / compression / "model"
    rounded, _ = loading.load(folder)
    scales = {
        name.removesuffix(".scales"): tensor.float().T  # (out, groups)
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith(".scales")
    }
    integers, products = {}, {}  # of each layer: as refit takes them, and B A
    documents = text.texts(results / "datasets" / dataset / "data", column)
    ids, _ = text.windows(documents, tokenizer, 24, 1024, "packed", ("windows", "window"))
    moments = results / "covariance" / model / calibration / "0-of-1" / "moments"

    for done in range(rounds + 1):
        for name in scales:
            _, _, index, local = name.split(".", 3)  # model.layers.7.mlp.up_proj
            inputs = covariance.Moments(moments / block_files.name(int(index)))
            lower = inputs.lower(inputs.shared[local])
            weight = original.get_submodule(name).weight.float()
            layer = rounded.get_submodule(name).weight
            if done == 0:
                approximate = layer.float()
                groups = approximate.view(*scales[name].shape, -1)
                integers[name] = (groups / scales[name][..., None]).round()
            else:
                target = weight - products.get(name, 0)
                new = refit(target, integers[name], lower + lower.tril(-1).T)
                approximate = (integers[name] * new[..., None]).view(weight.shape)
            if rank:
                found = decompose(weight - approximate, Metric(lower, "eora"), rank)
                products[name] = found.lora_B @ found.lora_A
                approximate = approximate + products[name]
            layer.data = approximate.to(layer.dtype)
        judged = evaluation.perplexity(rounded, ids, 8).metrics["perplexity"]
        typer.echo(f"rank {rank}, {done} rounds: {judged['value']:.2f} ± {judged['stderr']:.2f}")


if __name__ == "__main__":
    typer.run(main)
