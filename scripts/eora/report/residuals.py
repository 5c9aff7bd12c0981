"""What each rank leaves of a compression's error, layer by layer: figures from residual curves."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from eora.report.comparing import made_around
from eora.report.figures import COLOURS, FIGURE_STYLE, INK, LINES, QUIET, inline_svg, to_svg
from eora.report.reading import Row
from eora.report.words import show_share


def kind(layer: str) -> str:
    """A layer's name without its block and its own number: q, down, expert up and the like."""
    last = layer.rpartition(".")[2].removesuffix("_proj")
    return f"expert {last}" if ".experts." in layer else last


def shares(residuals: Mapping[str, list[float]]) -> pd.DataFrame:
    """Root of the share of the output error that is left; a row a layer, a column a rank.

    Args:
        residuals: layer -> the objective left at each rank, from 0 on. A layer narrower than the
            largest rank has fewer: nothing is left beyond, nor of a layer without error.

    Returns:
        Index (kind, block), where block is the first number in the layer's name.
    """
    table = pd.DataFrame({name: pd.Series(curve) for name, curve in residuals.items()}).T
    table = table.div(table[0], axis=0).fillna(0.0) ** 0.5
    numbers = [int(next(iter(re.findall(r"\.(\d+)\.", name)), 0)) for name in table.index]
    index = pd.MultiIndex.from_arrays(
        [list(map(kind, table.index)), numbers], names=["kind", "block"]
    )
    # Experts of a block count as one layer.
    return table.set_axis(index).groupby(level=[0, 1], sort=False).mean()


def means(left: pd.DataFrame) -> pd.DataFrame:
    """The mean over blocks; a row a kind."""
    return left.groupby(level="kind", sort=False).mean()


def draw_curves(left: pd.DataFrame, ranks: list[int]) -> str:
    """SVG text: what each rank leaves, on the mean of each kind of layer."""
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=(5.6, 4.2), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for i, (name, curve) in enumerate(means(left).iterrows()):
            style = LINES[i // len(COLOURS) % len(LINES)][0]
            axes.plot(curve, label=name, color=COLOURS[i % len(COLOURS)], ls=style, lw=1.6)
        for rank in ranks:
            axes.axvline(rank, color=QUIET, lw=0.8, ls=":")
        axes.set(xlabel="rank (dotted: those judged)", ylabel="output error left")
        axes.set(xlim=(0, left.columns[-1]), ylim=(0, 1.02))
        axes.legend(ncols=2, fontsize=10, frameon=False, labelcolor=INK)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return to_svg(figure)


def draw_layers(left: pd.DataFrame, rank: int) -> str:
    """SVG text: what one rank leaves of each layer's error, kinds against blocks."""
    layers = left[rank].unstack("block").reindex(means(left).index).sort_index(axis=1)
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=(5.6, 4.2), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(False)
        edges = (np.arange(size + 1) - 0.5 for size in layers.shape[::-1])
        drawn = axes.pcolormesh(*edges, layers.to_numpy(float), cmap="cividis", vmin=0)
        axes.set_yticks(range(len(layers)), layers.index)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set(xlabel=f"block (output error left at rank {rank})")
        axes.invert_yaxis()
        figure.colorbar(drawn, ax=axes, format=PercentFormatter(1.0, decimals=0))
        return to_svg(figure)


def figures(rows: Iterable[Row], prefix: str) -> list[dict[str, Any]]:
    """Two drawings for each compression and adapter of a model whose curves are kept."""
    adapted = [row for row in rows if row["residuals"] is not None]
    found = []
    for pair in dict.fromkeys((row["compression"], row["adapter"]) for row in adapted):
        of_pair = [row for row in adapted if (row["compression"], row["adapter"]) == pair]
        left = shares(of_pair[0]["residuals"])  # the same whatever the rank and bits
        ranks = sorted({int(row["rank"]) for row in of_pair} & set(left.columns))
        if not ranks:
            continue
        words = [
            f"rank {rank}: {', '.join(f'{name} {show_share(share)}' for name, share in at.items())}"
            for rank, at in means(left)[ranks].items()
        ]
        last = left[ranks[-1]]
        most = f"{last.idxmax()[0]} of block {last.idxmax()[1]}, {show_share(last.max())}"
        drawn = {
            f"Output error left by kind of layer. {'; '.join(words)}.": draw_curves(left, ranks),
            f"Output error left by layer; most in {most}.": draw_layers(left, ranks[-1]),
        }
        prefixes = (f"{prefix}{len(found)}-{i}-" for i in (1, 2))
        svgs = [
            inline_svg(svg, start, label)
            for start, (label, svg) in zip(prefixes, drawn.items(), strict=True)
        ]
        found.append(
            {
                "compression": pair[0],
                "adapter": pair[1],
                "around": made_around(of_pair[0]),
                "svgs": svgs,
            }
        )
    return found
