"""Our solver against EoRA as the paper writes it, layer shape by layer shape."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from eora.solver import Factors, Metric, decompose  # noqa: E402

# A Qwen3-32B block: layer -> (out, in, which input it reads).
SHAPES = {
    "q": (8192, 5120, "attention"),
    "k": (1024, 5120, "attention"),
    "v": (1024, 5120, "attention"),
    "o": (5120, 8192, "values"),
    "gate": (25600, 5120, "mlp"),
    "up": (25600, 5120, "mlp"),
    "down": (5120, 25600, "activations"),
}


@dataclass
class Layer:
    """A layer's problem; float32, as weights and stored second moments are."""

    name: str
    error: Tensor
    moment: Tensor
    leader: str


def block(scale: float, seed: int = 0) -> list[Layer]:
    """The seven layers of a block whose widths are scaled, with inputs as models have them:
    correlated, of channel scales over three orders, a few of them far larger."""
    generator = torch.Generator().manual_seed(seed)
    moments: dict[str, Tensor] = {}
    layers = []
    for name, (out, features, leader) in SHAPES.items():
        rows, columns = int(out * scale), int(features * scale)
        if leader not in moments:
            mixed = torch.randn(columns, columns // 8, generator=generator)
            mixed = mixed @ mixed.T * (8 / columns) + torch.eye(columns)
            scales = torch.logspace(-2, 1, columns)[torch.randperm(columns, generator=generator)]
            scales[:: columns // 4] *= 100
            moments[leader] = mixed * scales * scales[:, None]
        error = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        layers.append(Layer(name, error, moments[leader], leader))
    return layers


def textbook(layer: Layer, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) as the paper has them, in float64: eigendecomposition of C,
    SVD of D Q L^1/2, and the projection back."""
    values, q = torch.linalg.eigh(layer.moment.double())
    root = values.clamp(min=1e-300).sqrt()
    u, s, vh = torch.linalg.svd(layer.error.double() @ (q * root), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank] / root @ q.T


def left(layer: Layer, b: Tensor, a: Tensor) -> float:
    """The objective that a product leaves."""
    rest = layer.error.double() - b @ a
    return float(((rest @ layer.moment.double()) * rest).sum())


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def main(
    scales: Annotated[
        list[float] | None,
        typer.Argument(help="Widths, as parts of Qwen3-32B's [default: 0.125 0.25]"),
    ] = None,
    rank: Annotated[int, typer.Option(help="Largest rank; at most half a layer's width.")] = 128,
    repeats: Annotated[int, typer.Option(help="Times that each is run, in turns.")] = 3,
) -> None:
    """Time our solver and the textbook form on each layer shape of a Qwen3-32B block, in turns.

    Medians, their ratio, and how much more of the objective ours leaves than the textbook form
    (relative; the aim is at most 1e-6). Layers that read the same input share what ours makes of
    it: that is counted in the first of them. The last column is the growth exponent of our time
    since the scale before.
    """
    typer.echo(
        f"{'layer':<6} {'out x in':>13} {'textbook s':>10} {'ours s':>8} {'ratio':>6} "
        f"{'excess':>9} {'growth':>6}"
    )
    before: dict[str, float] = {}
    last = 0.0
    for scale in scales or [0.125, 0.25]:
        layers = block(scale)
        times: dict[str, list[list[float]]] = {layer.name: [[], []] for layer in layers}
        excess = {}
        for _ in range(repeats):
            metrics: dict[str, Metric] = {}
            for layer in layers:
                top = min(rank, *(width // 2 for width in layer.error.shape))
                theirs, (b, a) = timed(lambda layer=layer, top=top: textbook(layer, top))

                def fit(
                    layer: Layer = layer, top: int = top, metrics: dict[str, Metric] = metrics
                ) -> Factors:
                    if layer.leader not in metrics:
                        metrics[layer.leader] = Metric(layer.moment, "eora")
                    return decompose(layer.error, metrics[layer.leader], top)

                ours, factors = timed(fit)
                times[layer.name][0].append(theirs)
                times[layer.name][1].append(ours)
                best = left(layer, b, a)
                excess[layer.name] = left(layer, factors.lora_B, factors.lora_A) / best - 1
        medians = {
            name: tuple(statistics.median(some) for some in both) for name, both in times.items()
        }
        shapes = {layer.name: "{} x {}".format(*layer.error.shape) for layer in layers}
        medians["block"] = tuple(map(sum, zip(*medians.values(), strict=True)))
        for name, (theirs, ours) in medians.items():
            growth = f"{math.log(ours / before[name], scale / last):6.1f}" if last else ""
            typer.echo(
                f"{name:<6} {shapes.get(name, ''):>13} {theirs:10.2f} {ours:8.3f} "
                f"{theirs / ours:6.1f} {excess.get(name, max(excess.values())):9.1e} {growth}"
            )
        before, last = {name: ours for name, (_, ours) in medians.items()}, scale


if __name__ == "__main__":
    typer.run(main)
