"""Rows beside each other: what was recovered, what is best for its size, what is noise."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from eora.report.reading import Row, known, variant_rows

CSV_COLUMNS = [
    "model",
    "variant",
    "compression",
    "bits",
    "group_size",
    "adapter",
    "method",
    "rank",
    "adapter_bits",
    "task",
    "metric",
    "value",
    "stderr",
    "higher_is_better",
    "samples",
    "bytes",
    "weight_bytes",
    "scale_bytes",
    "other_bytes",
    "adapter_bytes",
    "effective_bits",
    "recovered",
    "recovered_from",
    "p_value",
    "cheaper_alternative",
    "seconds",
    "loading_memory_bytes",
    "prompt_memory_bytes",
    "peak_memory_bytes",
    "planned_memory_bytes",
    "device",
]

# What only the page shows; kept in the frame so that `write` needs no other input.
PAGE_COLUMNS = ["available", "best_for_size", "dtype", "each", "metrics"]
PAGE_COLUMNS += ["losses", "prompt_tokens", "residuals", "tools"]

_WHOLE = ["group_size", "rank", "adapter_bits", "samples", "bytes", "weight_bytes", "scale_bytes"]
_WHOLE += ["other_bytes", "adapter_bytes", "available", "prompt_tokens"]
_WHOLE += [f"{what}_memory_bytes" for what in ("loading", "prompt", "peak", "planned")]

_REAL = ["effective_bits", "recovered", "p_value", "seconds"]

# A difference that chance makes as often as this is called noise ...
CHANCE = 0.05

# ... by so many permutations, or below this many standard errors where samples are not known.
PERMUTATIONS = 1999

NOISE_ERRORS = 2.0


def is_perplexity(metric: str) -> bool:
    """Whether a metric is a perplexity, so that its logarithm (nats) is what adds up."""
    return "perplexity" in metric.lower() or metric.lower() == "ppl"


def linear(value: float, metric: str) -> float:
    """The value on a scale on which shares make sense: nats for perplexity."""
    if not is_perplexity(metric):
        return value
    return math.log(value) if value > 0 else math.nan


def recovered_share(
    original: float, compressed: float, adapted: float, metric: str, higher_is_better: bool
) -> float | None:
    """Share of the loss from original to compressed that the adapter wins back (1 = all).

    None if nothing was lost, or if any of the three is not a finite number.
    """
    sign = 1 if higher_is_better else -1
    top, base, now = (sign * linear(v, metric) for v in (original, compressed, adapted))
    if not all(map(math.isfinite, (top, base, now))) or top <= base:
        return None
    return (now - base) / (top - base)


def score(value: float, higher_is_better: bool) -> float:
    """A number that grows as the value gets better; nan counts as the worst."""
    if math.isnan(value):
        return -math.inf
    return value if higher_is_better else -value


def base_row(rows: list[Row], compression: str | None) -> Row | None:
    """The row without adapter of this compression (None: the original), if there is one."""
    plain = (r for r in rows if pd.isna(r["adapter"]))
    if compression is None:
        return next((r for r in plain if pd.isna(r["compression"])), None)
    return next((r for r in plain if r["compression"] == compression), None)


def uncompensated(row: Row, rows: list[Row]) -> Row | None:
    """The row whose loss this one's adapter makes up for, if there is one: the same compression
    without it; of one made around an adapter, of no use alone, that which it began with."""
    return base_row(rows, row["recovered_from"])


def made_around(row: Row) -> bool:
    """Whether a variant's compression was made around an adapter."""
    return not pd.isna(row["adapter"]) and row["recovered_from"] != row["compression"]


def recovered(row: Row, rows: list[Row]) -> float | None:
    """`recovered_share` of one row among all rows of its model and task."""
    if pd.isna(row["adapter"]):
        return None
    original, compressed = base_row(rows, None), uncompensated(row, rows)
    if original is None or compressed is None:
        return None
    values = (r["value"] for r in (original, compressed, row))
    return recovered_share(*values, row["metric"], row["higher_is_better"])


def p_of_adapter(row: Row, rows: list[Row]) -> float | None:
    """`p_value` of a variant with adapter against :func:`uncompensated`."""
    compressed = None if pd.isna(row["adapter"]) else uncompensated(row, rows)
    return None if compressed is None else p_value(row, compressed)


def cheaper_alternative(row: Row, rows: list[Row]) -> str | None:
    """The smallest variant without adapter that needs no more bytes and is as good or better."""
    if pd.isna(row["adapter"]):
        return None
    up = row["higher_is_better"]
    beating = [
        r
        for r in rows
        if pd.isna(r["adapter"])
        and r["bytes"] <= row["bytes"]
        and not math.isnan(r["value"])
        and score(r["value"], up) >= score(row["value"], up)
    ]
    # Among equals in size the better one, then the name, so that the answer is always the same.
    beating.sort(key=lambda r: (r["bytes"], -score(r["value"], up), r["variant"]))
    return beating[0]["variant"] if beating else None


def best_for_size(rows: list[Row]) -> list[Row]:
    """The rows that no smaller (or equally large) row matches, from small to large."""
    best, kept = -math.inf, []
    for row in sorted(rows, key=lambda r: (r["bytes"], -score(r["value"], r["higher_is_better"]))):
        if score(row["value"], row["higher_is_better"]) > best and math.isfinite(row["value"]):
            best = score(row["value"], row["higher_is_better"])
            kept.append(row)
    return kept


def p_value(a: Row, b: Row) -> float | None:
    """How likely two variants that are equally good would differ this much, sample by sample.

    Both answered the same samples: a paired permutation test of the mean difference, two-sided
    (for right and wrong answers that is McNemar's test). None where samples are not known.
    """
    if a["each"] is None or b["each"] is None or len(a["each"]) != len(b["each"]):
        return None
    difference = np.subtract(a["each"], b["each"])
    difference = difference[difference != 0]  # the others say nothing
    if len(difference) < 2:  # a single one falls to either side as often
        return 1.0
    test = stats.permutation_test(
        [difference],
        np.mean,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        vectorized=True,
        rng=0,
    )
    return float(test.pvalue)


def is_noise(a: Row, b: Row) -> bool:
    """Whether it may be chance that one of two variants is the better one.

    Where samples are not known, a difference of less than two standard errors, taken as
    independent; without those nothing is called noise.
    """
    p = p_value(a, b)
    if p is not None:
        return p > CHANCE
    if not (known(a["stderr"]) and known(b["stderr"])):
        return False
    return abs(a["value"] - b["value"]) < NOISE_ERRORS * math.hypot(a["stderr"], b["stderr"])


def compare(rows: list[Row]) -> list[Row]:
    """Add the columns that need all rows of one model and task."""
    if len({r["metric"] for r in rows}) > 1:
        found = ", ".join(f"{r['variant']}: {r['metric']}" for r in rows)
        raise ValueError(f"{rows[0]['task']} has more than one primary metric ({found})")
    best = {r["variant"] for r in best_for_size(rows)}
    return [
        {
            **row,
            "recovered": recovered(row, rows),
            "p_value": p_of_adapter(row, rows),
            "cheaper_alternative": cheaper_alternative(row, rows),
            "best_for_size": row["variant"] in best,
        }
        for row in rows
    ]


def build(results: Path, plan: Mapping[str, Any]) -> pd.DataFrame:
    """One row per variant and task of the plan: `CSV_COLUMNS`, then `PAGE_COLUMNS`."""
    results = Path(results)
    rows = [r for variant in plan["variants"] for r in variant_rows(results, variant, plan)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["task"]), []).append(row)
    compared = {
        (row["model"], row["task"], row["variant"]): row
        for group in groups.values()
        for row in compare(group)
    }
    ordered = [compared[r["model"], r["task"], r["variant"]] for r in rows]
    frame = pd.DataFrame(ordered, columns=CSV_COLUMNS + PAGE_COLUMNS)
    types = dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_REAL, "Float64")
    # Bits may be whole or, for mixed schemes, not: let pandas see which.
    return frame.astype(types).assign(bits=frame["bits"].convert_dtypes())
