"""Our solver against EoRA as the paper writes it, layer shape by layer shape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import common
from common import Target
from eora.solver import Factors, Metric, decompose

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


def growth(now: float, before: float, step: float) -> float:
    """Exponent of a time's growth with the width, from two times and the widths' ratio."""
    return math.log(now / before, step)


def measure(scale: float, rank: int, repeats: int) -> list[dict[str, Any]]:
    """Both solvers on a block's layers, in turns: a row of medians a layer, the block's last."""
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
    rows = []
    for layer in layers:
        theirs, ours = map(statistics.median, times[layer.name])
        shape = "{} x {}".format(*layer.error.shape)
        rows.append(
            {
                "scale": scale,
                "layer": layer.name,
                "shape": shape,
                "textbook": theirs,
                "ours": ours,
                "excess": excess[layer.name],
            }
        )
    whole = {key: sum(row[key] for row in rows) for key in ("textbook", "ours")}
    worst = max(row["excess"] for row in rows)
    return [*rows, {"scale": scale, "layer": "block", "shape": "", **whole, "excess": worst}]


def main(
    scales: Annotated[
        list[float] | None,
        typer.Argument(help="Widths, as parts of Qwen3-32B's.", show_default="0.125 0.25 0.5"),
    ] = None,
    rank: Annotated[int, typer.Option(help="Largest rank; at most half a layer's width.")] = 128,
    repeats: Annotated[
        int, typer.Option(min=1, help="Times that each is run, in turns; once above scale 0.25.")
    ] = 3,
    json_file: common.Json = None,
) -> None:
    """Time our solver and the textbook form on each layer shape of a Qwen3-32B block, in turns.

    Medians, their ratio, and how much more of the objective ours leaves than the textbook form
    (relative; the aim is at most 1e-6). Layers that read the same input share what ours makes of
    it: that is counted in the first of them. The last columns are the exponents by which the
    textbook form's time and ours grow with the width, since the scale before.

    On two cores scale 0.25 takes some 10 minutes, and 0.5 up to an hour and 12 GB of memory;
    nearly all of it is the textbook form's.
    """
    typer.echo(
        f"{'layer':<6} {'out x in':>13} {'textbook s':>10} {'ours s':>8} {'ratio':>6} "
        f"{'excess':>9}  growth: textbook, ours"
    )
    found: list[dict[str, Any]] = []
    before: dict[str, dict[str, Any]] = {}
    for scale in scales or [0.125, 0.25, 0.5]:
        rows = measure(scale, rank, repeats if scale <= 0.25 else 1)
        for row in rows:
            row["ratio"] = row["textbook"] / row["ours"]
            exponents = ""
            if earlier := before.get(row["layer"]):
                step = scale / earlier["scale"]
                row["growth"] = {
                    side: growth(row[side], earlier[side], step) for side in ("textbook", "ours")
                }
                exponents = "{textbook:16.1f} {ours:6.1f}".format(**row["growth"])
            typer.echo(
                f"{row['layer']:<6} {row['shape']:>13} {row['textbook']:10.2f} "
                f"{row['ours']:8.3f} {row['ratio']:6.1f} {row['excess']:9.1e} {exponents}"
            )
        found += rows
        before = {row["layer"]: row for row in rows}
    targets = []
    for scale in dict.fromkeys(row["scale"] for row in found):
        *each, whole = (row for row in found if row["scale"] == scale)
        worst = min(each, key=lambda row: row["ratio"])
        targets += [
            Target(f"block at scale {scale:g}, times faster", whole["ratio"], least=20),
            Target(
                f"slowest shape at scale {scale:g} ({worst['layer']}), times faster",
                worst["ratio"],
                least=3,
            ),
            Target(f"residual at scale {scale:g}, relative excess", whole["excess"], most=1e-6),
        ]
    common.conclude(targets, found, json_file)


if __name__ == "__main__":
    typer.run(main)
