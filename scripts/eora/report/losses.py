"""What fine-tuning did: the loss of each step, a line for each adapter."""

from collections.abc import Iterable

import matplotlib.style
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from eora.report.figures import COLOURS, FIGURE_STYLE, INK, LINES, inline_svg, to_svg
from eora.report.reading import Row
from eora.report.words import show_value


def smooth(losses: pd.Series) -> pd.Series:
    """The mean over a tenth of the steps, up to each."""
    return losses.rolling(max(1, len(losses) // 10), min_periods=1).mean()


def figure(rows: Iterable[Row], prefix: str) -> Markup | None:
    """A model's losses as SVG; None where nothing was fine-tuned."""
    curves = {
        row["variant"]: pd.DataFrame(row["losses"]).set_index("step")["loss"]
        for row in rows
        if row["losses"] is not None
    }
    if not curves:
        return None
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        drawn = Figure(figsize=(8.4, 4.2), dpi=72, layout="constrained")
        axes = drawn.add_subplot()
        for i, (name, losses) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            style = LINES[i // len(COLOURS) % len(LINES)][0]
            axes.plot(losses, color=colour, lw=0.8, alpha=0.35)
            axes.plot(smooth(losses), label=name, color=colour, ls=style, lw=1.8)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        axes.legend(fontsize=10, frameon=False, labelcolor=INK)
        svg = to_svg(drawn)
    words = "; ".join(
        f"{name} from {show_value(ends.iloc[0])} to {show_value(ends.iloc[-1])}"
        for name, ends in ((name, smooth(losses)) for name, losses in curves.items())
    )
    return inline_svg(svg, prefix, f"Loss of fine-tuning by step: {words}.")
