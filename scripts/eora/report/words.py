"""Numbers as a reader wants them."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from eora.report.reading import known, number

# Keeps a number and its unit on one line.
NBSP = "\N{NO-BREAK SPACE}"


def decimals(value: float) -> int:
    """How many decimals a value of this size is shown with."""
    size = abs(value)
    return 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0


def show_value(value: Any, like: float | None = None) -> str:
    """A metric's value in words; `like` gives the number of decimals."""
    value = number(value)
    if not math.isfinite(value):
        return str(value).replace("-", "\N{MINUS SIGN}")
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    places = decimals(value if like is None or not math.isfinite(like) else like)
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def show_error(stderr: Any, value: float) -> str:
    """The standard error with its sign, or nothing if it is not known."""
    if not known(stderr):
        return ""
    return f"\N{PLUS-MINUS SIGN} {show_value(stderr, value)}"


def show_bytes(size: Any) -> str:
    """Bytes in decimal units (1 MB = 1,000,000 bytes)."""
    if pd.isna(size):
        return ""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            scaled = size / step
            return f"{scaled:,.{2 if scaled < 10 else 1}f}{NBSP}{unit}"
    return f"{size}{NBSP}B"


def show_share(share: Any) -> str:
    """A share as whole percents."""
    if pd.isna(share):
        return ""
    # The sum turns a negative zero into zero.
    return f"{round(100 * share) + 0:,d}{NBSP}%".replace("-", "\N{MINUS SIGN}")


def show_seconds(seconds: Any) -> str:
    """Seconds, or minutes and hours where these are easier to read."""
    if pd.isna(seconds):
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_setting(value: Any) -> str:
    """A value of the configuration."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def distinct(values: Iterable[Any]) -> str:
    """The different values that are there, in the order in which they come."""
    return ", ".join(dict.fromkeys(str(v) for v in values if not pd.isna(v)))


def joined(parts: Sequence[str]) -> Markup:
    """Parts as "a, b and c"."""
    if len(parts) < 2:
        return Markup("").join(parts)
    return Markup(", ").join(parts[:-1]) + Markup(" and ") + parts[-1]
