"""Figures: what a model does against its size, and against the rank of its adapter."""

import io
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eora.report.comparing import base_row, is_perplexity, uncompensated
from eora.report.reading import Row, known
from eora.report.words import show_bytes, show_value

# Distinct for colour-blind readers, and each at least 4.5:1 against white.
COLOURS = ["#0066a6", "#b84a00", "#00735a", "#9c3587", "#7a5c00", "#332288", "#4d4d4d"]

INK = "#24303c"

QUIET = "#5b6875"

# matplotlib's marker, and the same shape for the legend in a box of 14 x 14.
BASE_MARKER = ("s", "M3 3H11V11H3Z")

MARKERS = [
    ("o", "M7 2.2A4.8 4.8 0 1 1 6.99 2.2Z"),
    ("^", "M7 2L12 11.5H2Z"),
    ("D", "M7 1.5L12.5 7L7 12.5L1.5 7Z"),
    ("v", "M2 2.5H12L7 12Z"),
    ("P", "M5 2H9V5H12V9H9V12H5V9H2V5H5Z"),
]

LINES = [("solid", ""), ("dashed", "5 3"), ("dotted", "1.5 2.5"), ("dashdot", "6 2 1.5 2")]

# Perplexities that differ by more than this factor are drawn on a log axis.
LOG_RANGE = 5.0


FIGURE_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "eoraflow",
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 11,
    "axes.edgecolor": "#aab4be",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "xtick.color": "#aab4be",
    "ytick.color": "#aab4be",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
}
Box = tuple[float, float, float, float]


class Looks(NamedTuple):
    """How compressions, adapter bits and adapters look in all figures of one model."""

    colours: dict[str, str]
    markers: dict[int, tuple[str, str]]
    lines: dict[str, tuple[str, str]]


def looks(rows: list[Row]) -> Looks:
    """Give each compression a colour, each number of bits a marker, each adapter a line."""

    def cycle(keys: Iterable[Any], of: list[Any]) -> dict[Any, Any]:
        return {key: of[i % len(of)] for i, key in enumerate(dict.fromkeys(keys))}

    adapted = [r for r in rows if not pd.isna(r["adapter"])]
    return Looks(
        cycle((r["compression"] for r in rows if not pd.isna(r["compression"])), COLOURS),
        cycle(sorted({r["adapter_bits"] for r in adapted}, reverse=True), MARKERS),
        cycle((r["adapter"] for r in adapted), LINES),
    )


class Across(NamedTuple):
    """What a figure's horizontal axis shows.

    Attributes:
        label: its title.
        of: a row's place on it.
        ranks: where it is marked, if it shows ranks; 0 is the model without adapter.
    """

    label: str
    of: Callable[[Row], float]
    ranks: tuple[int, ...] = ()


def by_size(rows: list[Row]) -> Across:
    """Bytes of the model with its adapter, in the unit that suits these rows."""
    unit, step = size_unit(r["bytes"] for r in rows)
    return Across(f"size of the model with its adapter ({unit})", lambda row: row["bytes"] / step)


def by_rank(rows: list[Row]) -> Across:
    """The adapter's rank, each doubling as wide as the last."""
    ranks = tuple(sorted({r["rank"] for r in rows if not pd.isna(r["rank"])}))
    label = "rank of the adapter (0: without)"
    return Across(label, lambda row: 0 if pd.isna(row["rank"]) else row["rank"], ranks)


def size_unit(sizes: Iterable[int]) -> tuple[str, int]:
    """The unit for an axis of sizes, and its bytes."""
    largest = max(sizes, default=0)
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next(((unit, step) for unit, step in units if largest >= step), ("bytes", 1))


def wants_log(metric: str, values: list[float]) -> bool:
    """Whether the values are perplexities too far apart for a linear axis."""
    return is_perplexity(metric) and min(values) > 0 and max(values) > LOG_RANGE * min(values)


def overlap(a: Box, b: Box) -> float:
    """Shared area of two boxes (left, bottom, right, top)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def place(
    point: tuple[float, float], size: tuple[float, float], taken: list[Box], frame: Box
) -> Box:
    """The box near a point, of this size, that covers least of what is taken."""
    (x, y), (width, height), gap = point, size, 7.0
    left, right, low, high = x - gap - width, x + gap, y - gap - height, y + gap
    middle, level = x - width / 2, y - height / 2
    corners = [(middle, high), (middle, low), (right, level), (left, level)]
    corners += [(right - 2, high - 3), (left + 2, high - 3), (right - 2, low + 3)]
    corners += [(left + 2, low + 3), (middle, high + 11), (middle, low - 11)]
    boxes = [(cx, cy, cx + width, cy + height) for cx, cy in corners]

    def cost(box: Box) -> float:
        outside = width * height - overlap(box, frame)
        return 3 * outside + sum(overlap(box, other) for other in taken)

    return min(boxes, key=cost)


def around(points: Iterable[tuple[float, float]], half: float) -> list[Box]:
    """Square boxes around points."""
    return [(x - half, y - half, x + half, y + half) for x, y in points]


def along(a: tuple[float, float], b: tuple[float, float], half: float) -> list[Box]:
    """Small boxes along a line, so that labels keep off it."""
    steps = max(1, int(math.dist(a, b) / (2 * half)))
    shares = [i / steps for i in range(steps + 1)]
    return around([(a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1])) for s in shares], half)


def series(rows: list[Row]) -> list[list[Row]]:
    """The rows of one task as lines through ranks, each from its model without adapter."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not pd.isna(row["adapter"]):
            key = (row["compression"], row["adapter"], row["adapter_bits"])
            groups.setdefault(key, []).append(row)
    starts = {key: uncompensated(group[0], rows) for key, group in groups.items()}
    return [
        ([starts[key]] if starts[key] else []) + sorted(group, key=lambda r: r["rank"])
        for key, group in groups.items()
    ]


def spaced(ranks: Iterable[int], apart: float = 0.4) -> list[int | str]:
    """The ranks to name on the axis: of those less than 0.4 doublings apart the first."""
    found: list[int | str] = []
    last = 0.0
    for rank in ranks:
        far = not found or math.log2(rank) - last >= apart
        last = math.log2(rank) if far else last
        found.append(rank if far else "")
    return found


def style_axes(axes: Axes, rows: list[Row], across: Across) -> None:
    """Scales, limits and labels."""
    metric, values = rows[0]["metric"], [r["value"] for r in rows]
    better = "higher is better" if rows[0]["higher_is_better"] else "lower is better"
    axes.set_xlabel(across.label)
    axes.set_ylabel(f"{metric} ({better})", labelpad=9)
    axes.margins(x=0.09, y=0.12)
    if across.ranks:
        axes.set_xscale("symlog", base=2, linthresh=across.ranks[0], linscale=0.5)
        axes.set_xticks([0, *across.ranks], ["0", *map(str, spaced(across.ranks))])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if wants_log(metric, values):
        ratio = max(values) / min(values)
        subs = (1.0, 2.0, 5.0) if ratio < 100 else (1.0, 3.0) if ratio < 3000 else (1.0,)
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))


def draw_points(axes: Axes, rows: list[Row], look: Looks, across: Across) -> None:
    """Lines through ranks, error bars and markers."""
    for line in series(rows):
        colour, adapter = look.colours[line[-1]["compression"]], line[-1]["adapter"]
        axes.plot(
            [across.of(r) for r in line],
            [r["value"] for r in line],
            color=colour,
            linewidth=1.6,
            linestyle=look.lines[adapter][0],
            alpha=0.75,
            zorder=3,
        )
    for row in rows:
        plain = pd.isna(row["adapter"])
        colour = INK if pd.isna(row["compression"]) else look.colours[row["compression"]]
        x, y = across.of(row), row["value"]
        if known(row["stderr"]):
            axes.errorbar(x, y, row["stderr"], color=colour, alpha=0.4, linewidth=1.1, capsize=2.5)
        marker = BASE_MARKER if plain else look.markers[row["adapter_bits"]]
        axes.plot(
            x,
            y,
            marker[0],
            color=colour,
            markersize=8 if plain else 7.5,
            markeredgecolor="white",
            markeredgewidth=1,
            zorder=5,
        )


def draw_original(axes: Axes, row: Row) -> None:
    """The original as a dashed line with its standard error as a band."""
    axes.axhline(row["value"], color=INK, linewidth=1.3, dashes=(5, 3), zorder=2)
    if known(row["stderr"]):
        low, high = row["value"] - row["stderr"], row["value"] + row["stderr"]
        axes.axhspan(low, high, color=INK, alpha=0.07, linewidth=0, zorder=1)


def draw_labels(
    axes: Axes, rows: list[Row], original: Row | None, look: Looks, across: Across
) -> None:
    """Name the points, keeping the names off points, lines and each other."""
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was measured must not move any more

    def spot(row: Row) -> tuple[float, float]:
        x, y = axes.transData.transform((across.of(row), row["value"]))
        return float(x), float(y)

    frame = tuple(axes.bbox.extents)
    taken = around(map(spot, rows), 4.5)
    for line in series(rows):
        for a, b in zip(line, line[1:], strict=False):
            taken += along(spot(a), spot(b), 1.5)
    names = []
    if original is not None:
        y = float(axes.transData.transform((0, original["value"]))[1])
        taken += along((frame[0], y), (frame[2], y), 1.5)
        text = f"original {show_value(original['value'])} ({show_bytes(original['bytes'])})"
        names.append((text, (frame[2] - 3.2 * len(text), y), INK, "normal"))
    # A compression goes by the name at its point without adapter, or else at its smallest rank.
    first = {r["compression"]: r for r in sorted(rows, key=across.of, reverse=True)}
    for row in rows:
        if pd.isna(row["compression"]):
            continue  # its line is named already
        plain = pd.isna(row["adapter"])
        if across.ranks and row is not first[row["compression"]]:
            continue  # the axis tells them
        text = row["compression"] if plain or across.ranks else f"r{row['rank']}"
        colour = look.colours[row["compression"]]
        names.append((text, spot(row), colour, "bold" if plain else "normal"))
    for text, point, colour, weight in names:
        size = (10 * (0.68 if weight == "bold" else 0.6) * len(text), 10.0)
        box = place(point, size, taken, frame)
        taken.append(box)
        axes.annotate(
            text,
            ((box[0] + box[2]) / 2, box[1]),
            xycoords="figure pixels",
            ha="center",
            va="baseline",
            fontsize=10,
            color=colour,
            fontweight=weight,
            zorder=6,
        )


def draw(rows: list[Row], look: Looks, axis: Callable[[list[Row]], Across] = by_size) -> str:
    """One figure as SVG text: value against size or rank for one model and task (finite values)."""
    original = base_row(rows, None)
    points = [r for r in rows if r is not original] or rows
    across = axis(points)
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        # 72 dots an inch make pixels and points the same.
        figure = Figure(figsize=(5.6, 4.4), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        draw_points(axes, points, look, across)
        if original is not None:
            draw_original(axes, original)
        style_axes(axes, rows, across)
        draw_labels(axes, points, original, look, across)
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """A figure as SVG text that is the same each time; within the style it was drawn in."""
    target = io.StringIO()
    quiet = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(target, format="svg", metadata=quiet, transparent=True)
    return target.getvalue()


def inline_svg(raw: str, prefix: str, label: str) -> Markup:
    """SVG for the inside of an HTML page: scalable, named, and with ids of its own."""
    root = ElementTree.fromstring(raw)
    for parent in list(root.iter()):
        for child in list(parent):
            # Style sheets inside an SVG would reach the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = prefix + attributes["id"]
        if attributes.get("href", "").startswith("#"):
            attributes["href"] = f"#{prefix}{attributes['href'][1:]}"
        element.attrib.clear()
        element.attrib.update(
            {key: value.replace("url(#", f"url(#{prefix}") for key, value in attributes.items()}
        )
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def figure_label(rows: list[Row], against: str) -> str:
    """The figure in words, for readers who do not see it."""
    task, metric = rows[0]["task"], rows[0]["metric"]
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    points = "; ".join(
        f"{r['variant']} {show_value(r['value'])} at {show_bytes(r['bytes'])}" for r in rows
    )
    return f"{metric} on {task} against {against} ({better} is better): {points}."


def figure(rows: list[Row], look: Looks, prefix: str) -> Row:
    """What the page needs to show one model and task."""
    finite = [r for r in rows if math.isfinite(r["value"])]
    missing = [f"{r['variant']} ({show_value(r['value'])})" for r in rows if r not in finite]
    several = len(by_rank(finite).ranks) > 1

    def svg(axis: Callable[[list[Row]], Across], against: str) -> Markup:
        label = figure_label(finite, against)
        return inline_svg(draw(finite, look, axis), f"{prefix}{against}-", label)

    return {
        "task": rows[0]["task"],
        "metric": rows[0]["metric"],
        "better": "higher is better" if rows[0]["higher_is_better"] else "lower is better",
        "log": bool(finite) and wants_log(rows[0]["metric"], [r["value"] for r in finite]),
        "svg": svg(by_size, "size") if finite else None,
        "ranks": svg(by_rank, "rank") if several else None,
        "missing": ", ".join(missing),
    }
