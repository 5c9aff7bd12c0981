"""Turn manifests and evaluation results into one table (CSV and JSON) and one HTML page.

Everything here is a function from rows to text: nothing is measured again, and the same
inputs give the same bytes. Sizes are in bytes, times in seconds, shares in parts of one.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy import stats

from eora.errors import Mistake

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
    "p_value",
    "cheaper_alternative",
    "seconds",
    "peak_memory_bytes",
    "device",
]
# What only the page shows; kept in the frame so that `write` needs no other input.
PAGE_COLUMNS = ["best_for_size", "dtype", "each", "metrics", "tools"]

_WHOLE = ["group_size", "rank", "adapter_bits", "samples", "bytes", "weight_bytes", "scale_bytes"]
_WHOLE += ["other_bytes", "adapter_bytes", "peak_memory_bytes"]
_REAL = ["effective_bits", "recovered", "p_value", "seconds"]

# Bits of one element, under the names that safetensors headers use.
DTYPE_BITS = {
    **dict.fromkeys(["C64", "F64", "I64", "U64"], 64),
    **dict.fromkeys(["F32", "I32", "U32"], 32),
    **dict.fromkeys(["F16", "BF16", "I16", "U16"], 16),
    **dict.fromkeys(["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"], 8),
    **dict.fromkeys(["F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    "F4": 4,
}

# What formats call a layer's weights; what else lies beside them scales them.
WEIGHTS = {"weight", "qweight", "weight_packed"}

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

# A difference that chance makes as often as this is called noise ...
CHANCE = 0.05
# ... by so many permutations, or below this many standard errors where samples are not known.
PERMUTATIONS = 1999
NOISE_ERRORS = 2.0
# An adapter that keeps this share of the best one's gain is "nearly as good".
NEARLY = 0.9
# Rows in the table of the best variants by budget.
MOST_BUDGETS = 9
# Perplexities that differ by more than this factor are drawn on a log axis.
LOG_RANGE = 5.0

# Keeps a number and its unit on one line.
NBSP = "\N{NO-BREAK SPACE}"

Row = dict[str, Any]


# --- reading -----------------------------------------------------------------------------


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; errors name `what` was wanted and the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mistake(f"{what} is missing: {path}; run its stage") from None
    except ValueError as error:
        raise Mistake(f"{what} is not JSON: {path}: {error}; remove it and run again") from None
    if not isinstance(found, dict):
        raise Mistake(f"{what} is not a JSON object: {path}; remove it and run again")
    return found


def read_manifest(path: Path, what: str) -> dict[str, Any]:
    """Read a manifest that must list tensors, as a size of nothing would win every budget."""
    manifest = read_json(path, what)
    if not total_bytes(manifest):
        raise ValueError(f"{what} lists no tensors: {path}")
    return manifest


def tensors(manifest: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """All tensors of a manifest, as {(file, tensor name): {"dtype", "shape"}}."""
    return {
        (file, name): tensor
        for file, inside in manifest.get("tensors", {}).items()
        for name, tensor in inside.items()
    }


def tensor_bytes(tensor: Mapping[str, Any]) -> int:
    """Bytes of one tensor's data, from shape and dtype."""
    dtype = tensor["dtype"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown tensor dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    return math.ceil(math.prod(tensor["shape"]) * DTYPE_BITS[dtype] / 8)


def total_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of all tensors of a manifest."""
    return sum(tensor_bytes(tensor) for tensor in tensors(manifest).values())


def adapter_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of an adapter's factors; a 16-bit one's folder also holds what rounding it needs."""
    return sum(tensor_bytes(t) for (_, name), t in tensors(manifest).items() if ".lora_" in name)


def decoder_weights(original: Mapping[str, Any]) -> dict[str, int]:
    """The layers that compression touches, as {prefix: number of weights}.

    These are the 2-D tensors inside a numbered block whose name ends in ".weight".
    """
    return {
        name.removesuffix(".weight"): math.prod(tensor["shape"])
        for (_, name), tensor in tensors(original).items()
        if name.endswith(".weight")
        and len(tensor["shape"]) == 2
        and any(part.isdecimal() for part in name.split("."))
    }


def bytes_by_part(manifest: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, int]:
    """Bytes of a model's weights of the layers below these prefixes, packed or not, of what those
    are scaled by (scales, zero points, permutations), and of all else: embeddings, norms, biases.
    """
    starts = tuple(f"{prefix}." for prefix in prefixes)
    found = dict.fromkeys(("weight_bytes", "scale_bytes", "other_bytes"), 0)
    for (_, name), tensor in tensors(manifest).items():
        last = name.rpartition(".")[2]
        if not name.startswith(starts) or last == "bias":
            part = "other_bytes"
        else:
            part = "weight_bytes" if last in WEIGHTS else "scale_bytes"
        found[part] += tensor_bytes(tensor)
    return found


def effective_bits(
    original: Mapping[str, Any], model: Mapping[str, Any], adapter_bytes: int
) -> float | None:
    """Bits spent per original decoder weight: packed weights, scales, zeros and adapter."""
    weights = decoder_weights(original)
    count = sum(weights.values())
    parts = bytes_by_part(model, weights)
    spent = parts["weight_bytes"] + parts["scale_bytes"] + adapter_bytes
    return 8 * spent / count if count else None


def number(value: Any) -> float:
    """A float; None and words that are no number become nan."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def known(value: Any) -> bool:
    """Whether a cell holds a finite number."""
    return not pd.isna(value) and math.isfinite(value)


# --- rows --------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a variant is made of; the original has only `original`."""

    original: Mapping[str, Any]
    compressed: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None


def read_parts(results: Path, variant: Mapping[str, Any]) -> Parts:
    """Read the manifests of one variant of the plan."""
    model, compression, adapter = variant["model"], variant["compression"], variant["adapter"]
    if adapter is not None and compression is None:
        raise ValueError(f"variant {variant['variant']!r} has an adapter but no compression")
    original = read_manifest(results / "models" / model / "manifest.json", "model manifest")
    if compression is None:
        return Parts(original, None, None)
    path = results / "compressed" / model / compression / "manifest.json"
    compressed = read_manifest(path, "manifest of the compressed model")
    if adapter is None:
        return Parts(original, compressed, None)
    form = f"r{variant['rank']}-{variant['adapter_bits']}bit"
    path = results / "adapters" / model / compression / adapter / form / "manifest.json"
    return Parts(original, compressed, read_manifest(path, "adapter manifest"))


def variant_columns(parts: Parts, variant: Mapping[str, Any], plan: Mapping[str, Any]) -> Row:
    """The columns that are the same for all tasks of a variant."""
    held = parts.compressed or parts.original
    extra = adapter_bytes(parts.adapter) if parts.adapter is not None else None
    settings = plan.get("compressions", {}).get(variant["compression"]) or {}
    adapter = plan.get("adapters", {}).get(variant["adapter"]) or {}
    return {
        "model": variant["model"],
        "variant": variant["variant"],
        "compression": variant["compression"],
        "bits": settings.get("bits"),
        "group_size": settings.get("group_size"),
        "adapter": variant["adapter"],
        "method": adapter.get("method"),
        "rank": variant["rank"],
        "adapter_bits": variant["adapter_bits"],
        "bytes": total_bytes(held) + (extra or 0),
        **bytes_by_part(held, decoder_weights(parts.original)),
        "adapter_bytes": extra,
        "effective_bits": effective_bits(parts.original, held, extra or 0),
        "tools": [
            (name, str(version))
            for manifest in parts
            if manifest is not None
            for name, version in manifest.get("tools", {}).items()
        ],
    }


def task_columns(path: Path, task: str, wanted: str | None) -> Row:
    """The columns that one evaluation's results.json gives; of metrics the wanted or usual one."""
    found = read_json(path, "evaluation results")
    metrics = found.get("metrics", {})
    metric = wanted or found.get("primary")
    if metric not in metrics:
        measured = ", ".join(metrics) or "none"
        raise Mistake(
            f"tasks.{task}.metric: {metric!r} was not measured; set it to one of {measured} "
            f"({path})"
        )
    primary = metrics[metric]
    if not isinstance(primary.get("higher_is_better"), bool):
        raise ValueError(f"{metric!r} does not say whether higher is better: {path}")
    return {
        "task": task,
        "metric": metric,
        "value": number(primary.get("value")),
        "stderr": number(primary.get("stderr")),
        "higher_is_better": primary["higher_is_better"],
        "samples": found.get("samples"),
        "seconds": found.get("seconds"),
        "peak_memory_bytes": found.get("peak_memory_bytes"),
        "device": found.get("device"),
        "dtype": found.get("dtype"),
        "metrics": metrics,
        "each": read_json(path.with_name("samples.json"), "samples").get(metric),
        "tools": [(name, str(version)) for name, version in found.get("versions", {}).items()],
    }


def variant_rows(results: Path, variant: Mapping[str, Any], plan: Mapping[str, Any]) -> list[Row]:
    """One row per task for one variant of the plan."""
    shared = variant_columns(read_parts(results, variant), variant, plan)
    folder = results / "evaluations" / variant["model"] / variant["variant"]
    wanted = plan.get("metrics", {})
    rows = [
        (task, task_columns(folder / task / "results.json", task, wanted.get(task)))
        for task in plan["tasks"]
    ]
    return [{**shared, **row, "tools": shared["tools"] + row["tools"]} for _, row in rows]


# --- comparing ---------------------------------------------------------------------------


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


def recovered(row: Row, rows: list[Row]) -> float | None:
    """`recovered_share` of one row among all rows of its model and task."""
    if pd.isna(row["adapter"]):
        return None
    original, compressed = base_row(rows, None), base_row(rows, row["compression"])
    if original is None or compressed is None:
        return None
    values = (r["value"] for r in (original, compressed, row))
    return recovered_share(*values, row["metric"], row["higher_is_better"])


def p_of_adapter(row: Row, rows: list[Row]) -> float | None:
    """`p_value` of a variant with adapter against the same compression without."""
    compressed = None if pd.isna(row["adapter"]) else base_row(rows, row["compression"])
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


# --- words -------------------------------------------------------------------------------


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


def joined(parts: list[Markup]) -> Markup:
    """Parts as "a, b and c"."""
    if len(parts) < 2:
        return Markup("").join(parts)
    return Markup(", ").join(parts[:-1]) + Markup(" and ") + parts[-1]


# --- the verdict -------------------------------------------------------------------------


def lead(rows: list[Row]) -> Markup:
    """Whether adapters pay for this model, in a sentence or two."""
    compensated = list(dict.fromkeys(r["variant"] for r in rows if not pd.isna(r["adapter"])))
    if not compensated:
        return Markup("No adapter was measured for this model, so only sizes can be compared.")
    beaten = {r["variant"] for r in rows if not pd.isna(r["cheaper_alternative"])}
    count, paying = len(compensated), [v for v in compensated if v not in beaten]
    if not paying:
        return Markup(
            "No adapter pays for itself here: for {} there is, on at least one task, a model"
            " without adapter that is at least as good and no larger."
        ).format("the only one" if count == 1 else f"each of the {count}")
    if count == 1:
        return Markup("The adapter pays for itself: nothing as small without adapter is as good.")
    if len(paying) == count:
        return Markup(
            "Each of the {} adapters pays for itself: nothing as small without adapter is as good."
        ).format(count)
    return Markup(
        "{} of {} adapters {} for {} on every task; for the others a model without adapter is"
        " at least as good and no larger on at least one."
    ).format(
        len(paying),
        count,
        "pays" if len(paying) == 1 else "pay",
        "itself" if len(paying) == 1 else "themselves",
    )


def mean_recovered(rows: list[Row]) -> dict[str, float]:
    """Mean recovered share over the tasks, for the variants that have it on all of them."""
    frame = pd.DataFrame(rows).dropna(subset=["recovered"])
    if frame.empty:
        return {}
    # A variant that broke on one task must not win on the remaining ones.
    found = frame.astype({"recovered": float}).groupby("variant", sort=False)["recovered"]
    spread = found.agg(["mean", "count"])
    return spread.loc[spread["count"] == spread["count"].max(), "mean"].to_dict()


def recovery_part(row: Row, compressed: Row, first: bool) -> Markup:
    """ "71 % of the loss on arc-easy", with a warning if the gain may be chance."""
    return Markup("{} {}on {}{}").format(
        show_share(row["recovered"]),
        "of the loss " if first else "",
        row["task"],
        " (within noise)" if is_noise(row, compressed) else "",
    )


def best_adapter(rows: list[Row], compression: str) -> Markup | None:
    """What the best adapter of a compression wins back and costs, and a smaller one as good."""
    adapted = [r for r in rows if r["compression"] == compression and not pd.isna(r["adapter"])]
    if not adapted:
        return None
    means = mean_recovered(adapted)
    if not means:
        return Markup(
            "<strong>{}</strong> loses nothing that could be measured, so an adapter has nothing"
            " to win back."
        ).format(compression)
    extra = {r["variant"]: r["adapter_bytes"] for r in adapted}
    best = min(means, key=lambda v: (-means[v], extra[v], v))
    mine = [r for r in adapted if r["variant"] == best and not pd.isna(r["recovered"])]
    plain = {
        r["task"]: r for r in rows if r["compression"] == compression and pd.isna(r["adapter"])
    }
    whole = Markup("<strong>{}</strong>: the best adapter, <strong>{}</strong>, {}").format(
        compression, short_name(mine[0]), "" if means[best] > 0 else "does not help: it "
    )
    share = extra[best] / (mine[0]["bytes"] - extra[best])
    whole += Markup("wins back {}, for {} more (+{}).").format(
        joined([recovery_part(r, plain[r["task"]], r is mine[0]) for r in mine]),
        show_bytes(extra[best]),
        f"{100 * share:.1f}{NBSP}%",
    )
    whole += caution([r for r in adapted if r["variant"] == best])
    near = [v for v in means if means[v] >= NEARLY * means[best] and extra[v] < extra[best]]
    if means[best] <= 0 or not near:
        return whole
    small = min(near, key=lambda v: (extra[v], v))
    near_rows = [r for r in adapted if r["variant"] == small]
    whole += Markup(" <strong>{}</strong> brings {} of that gain for {}.").format(
        short_name(near_rows[0]), show_share(means[small] / means[best]), show_bytes(extra[small])
    )
    return whole + caution(near_rows)


def short_name(row: Row) -> str:
    """An adapter without its compression, such as "eora r64 4-bit"."""
    return f"{row['adapter']} r{row['rank']} {row['adapter_bits']}-bit"


def round_up(size: float, digits: int) -> int:
    """The next whole number with so many significant digits."""
    step = 10 ** max(0, math.floor(math.log10(size)) + 1 - digits)
    return math.ceil(size / step) * step


def budgets(rows: list[Row]) -> list[int]:
    """The byte budgets at which to name the best: where it changes, or a few round sizes."""
    tasks = dict.fromkeys(r["task"] for r in rows)
    steps = [best_for_size([r for r in rows if r["task"] == task]) for task in tasks]
    exact = sorted({row["bytes"] for step in steps for row in step})
    if len(exact) <= MOST_BUDGETS:
        return exact
    # The original may be far larger than everything else: leave it out of the spacing.
    plain = base_row(rows, None)
    end = plain["bytes"] if plain else None
    inner = [size for size in exact if size != end]
    ratio = inner[-1] / inner[0]
    digits = 2 if ratio > 3 else 3
    count = MOST_BUDGETS - 2
    spaced = [round_up(inner[0] * ratio ** (i / count), digits) for i in range(count + 1)]
    return sorted({*spaced, exact[-1]})


def ladder(rows: list[Row], tasks: list[str]) -> list[Row]:
    """The best variant of each task within each budget, for the budgets that change a winner.

    `noise` marks a winner that may owe it to chance that it beats the last one.
    """
    lines: list[Row] = []
    last: list[Row | None] = [None] * len(tasks)
    for budget in budgets(rows):
        fits = [r for r in rows if r["bytes"] <= budget]
        best = [best_for_size([r for r in fits if r["task"] == task])[-1:] for task in tasks]
        now = [b[0] if b else None for b in best]
        changed = [b is not None and b is not a for a, b in zip(last, now, strict=True)]
        if not any(changed):
            continue
        cells = [
            b and {**b, "same": not new, "noise": new and a is not None and is_noise(a, b)}
            for a, b, new in zip(last, now, changed, strict=True)
        ]
        lines.append({"budget": budget, "cells": cells})
        last = now
    return lines


def alternatives(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of one variant that something cheaper matches, by what does."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not pd.isna(row["cheaper_alternative"]):
            found.setdefault(row["cheaper_alternative"], []).append(row)
    return found


def caution(rows: list[Row]) -> Markup:
    """A warning after praising a variant that something cheaper matches, or nothing."""
    text = Markup("")
    for other, beaten in alternatives(rows).items():
        tasks = [Markup.escape(r["task"]) for r in beaten]
        text += Markup(" But on {} <strong>{}</strong> is at least as good and no larger.").format(
            "every task" if len(tasks) == len(rows) > 1 else joined(tasks), other
        )
    return text


def cost_sentence(rows: list[Row], other: list[Row]) -> Markup:
    """Why a variant costs more than it brings: its beaten rows, and what beats them."""
    values = {r["task"]: r["value"] for r in other}
    gains = [
        Markup("{} instead of {} on {}").format(
            show_value(values[r["task"]], r["value"]), show_value(r["value"]), r["task"]
        )
        for r in rows
    ]
    same = other[0]["compression"] == rows[0]["compression"]
    return Markup(
        "<strong>{}</strong> needs {}; <strong>{}</strong>{} needs {} and gets {}."
    ).format(
        rows[0]["variant"],
        show_bytes(rows[0]["bytes"]),
        other[0]["variant"],
        " (the same model without the adapter)" if same else "",
        show_bytes(other[0]["bytes"]),
        joined(gains),
    )


def cost_sentences(rows: list[Row]) -> list[Markup]:
    """All cost sentences of one model."""
    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    return [
        cost_sentence(beaten, by_variant[other])
        for mine in by_variant.values()
        for other, beaten in alternatives(mine).items()
    ]


# --- figures -----------------------------------------------------------------------------

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
    starts = {key: base_row(rows, key[0]) for key in groups}
    return [
        ([starts[key]] if starts[key] else []) + sorted(group, key=lambda r: r["rank"])
        for key, group in groups.items()
    ]


def style_axes(axes: Axes, rows: list[Row], unit: str) -> None:
    """Scales, limits and labels."""
    metric, values = rows[0]["metric"], [r["value"] for r in rows]
    better = "higher is better" if rows[0]["higher_is_better"] else "lower is better"
    axes.set_xlabel(f"size of the model with its adapter ({unit})")
    axes.set_ylabel(f"{metric} ({better})", labelpad=9)
    axes.margins(x=0.09, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if wants_log(metric, values):
        ratio = max(values) / min(values)
        subs = (1.0, 2.0, 5.0) if ratio < 100 else (1.0, 3.0) if ratio < 3000 else (1.0,)
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))


def draw_points(axes: Axes, rows: list[Row], look: Looks, step: int) -> None:
    """Lines through ranks, error bars and markers."""
    for line in series(rows):
        colour, adapter = look.colours[line[-1]["compression"]], line[-1]["adapter"]
        axes.plot(
            [r["bytes"] / step for r in line],
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
        x, y = row["bytes"] / step, row["value"]
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


def draw_labels(axes: Axes, rows: list[Row], original: Row | None, look: Looks, step: int) -> None:
    """Name the points, keeping the names off points, lines and each other."""
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was measured must not move any more

    def spot(row: Row) -> tuple[float, float]:
        x, y = axes.transData.transform((row["bytes"] / step, row["value"]))
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
    for row in rows:
        if pd.isna(row["compression"]):
            continue  # its line is named already
        plain = pd.isna(row["adapter"])
        text = row["compression"] if plain else f"r{row['rank']}"
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


def draw(rows: list[Row], look: Looks) -> str:
    """One figure as SVG text: value against size for one model and task (finite values)."""
    original = base_row(rows, None)
    points = [r for r in rows if r is not original] or rows
    unit, step = size_unit(r["bytes"] for r in points)
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        # 72 dots an inch make pixels and points the same.
        figure = Figure(figsize=(5.6, 4.4), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        draw_points(axes, points, look, step)
        if original is not None:
            draw_original(axes, original)
        style_axes(axes, rows, unit)
        draw_labels(axes, points, original, look, step)
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


def figure_label(rows: list[Row]) -> str:
    """The figure in words, for readers who do not see it."""
    task, metric = rows[0]["task"], rows[0]["metric"]
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    points = "; ".join(
        f"{r['variant']} {show_value(r['value'])} at {show_bytes(r['bytes'])}" for r in rows
    )
    return f"{metric} on {task} against size ({better} is better): {points}."


def figure(rows: list[Row], look: Looks, prefix: str) -> Row:
    """What the page needs to show one model and task."""
    finite = [r for r in rows if math.isfinite(r["value"])]
    missing = [f"{r['variant']} ({show_value(r['value'])})" for r in rows if r not in finite]
    svg = inline_svg(draw(finite, look), prefix, figure_label(finite)) if finite else None
    return {
        "task": rows[0]["task"],
        "metric": rows[0]["metric"],
        "better": "higher is better" if rows[0]["higher_is_better"] else "lower is better",
        "log": bool(finite) and wants_log(rows[0]["metric"], [r["value"] for r in finite]),
        "svg": svg,
        "missing": ", ".join(missing),
    }


# --- the page ----------------------------------------------------------------------------


def table_rows(rows: list[Row], tasks: list[str]) -> list[Row]:
    """One row per variant with its cells by task, and whether a new compression begins."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["variant"], {**row, "cells": {}})["cells"][row["task"]] = row
    # Each compression with its adapters, in the plan's order of compressions.
    groups = list(dict.fromkeys(row["compression"] for row in found.values()))

    def place_of(row: Row) -> tuple[Any, ...]:
        if pd.isna(row["adapter"]):
            return (groups.index(row["compression"]), 0)
        return (groups.index(row["compression"]), 1, row["adapter"], row["rank"], row["bytes"])

    table = [
        {**row, "cells": [row["cells"][task] for task in tasks]}
        for row in sorted(found.values(), key=place_of)
    ]
    before = [None, *(row["compression"] for row in table[:-1])]
    for row, last in zip(table, before, strict=True):
        row["new_group"] = not pd.isna(row["compression"]) and row["compression"] != last
    return table


def metric_rows(rows: list[Row]) -> list[Row]:
    """All metrics of all evaluations, one a row."""
    return [
        {
            **row,
            "metric": name,
            "value": number(metric.get("value")),
            "stderr": number(metric.get("stderr")),
        }
        for row in rows
        for name, metric in row["metrics"].items()
    ]


def model_section(name: str, rows: list[Row], index: int) -> Row:
    """What the page shows of one model."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    by_task = {task: [r for r in rows if r["task"] == task] for task in tasks}
    look = looks(rows)
    verdicts = [best_adapter(rows, compression) for compression in look.colours]
    return {
        "name": name,
        "id": f"model-{index}",
        "lead": lead(rows),
        "verdicts": [v for v in verdicts if v is not None],
        "tasks": [{"task": task, "metric": by_task[task][0]["metric"]} for task in tasks],
        "ladder": ladder(rows, tasks),
        "looks": look,
        "figures": [
            figure(by_task[task], look, f"f{index}-{i}-") for i, task in enumerate(tasks, 1)
        ],
        "table": table_rows(rows, tasks),
        "details": metric_rows(rows),
        "costs": cost_sentences(rows),
    }


def settings_table(entries: Mapping[str, Mapping[str, Any]]) -> Row:
    """Named settings as a table: the union of their keys as columns."""
    keys = list(dict.fromkeys(key for entry in entries.values() for key in entry))
    lines = [(name, [show_setting(entry.get(k)) for k in keys]) for name, entry in entries.items()]
    return {"keys": keys, "lines": lines}


def evaluation_summary(frame: pd.DataFrame) -> list[Row]:
    """How each task was measured, per model: samples, device, total time and peak memory."""
    return [
        {
            "model": model,
            "task": task,
            "metric": distinct(group["metric"]),
            "samples": distinct(group["samples"]),
            "uneven": group["samples"].nunique() > 1,
            "device": distinct(group["device"]),
            "dtype": distinct(group["dtype"]),
            "seconds": group["seconds"].sum(min_count=1),
            "peak": group["peak_memory_bytes"].max(),
        }
        for (model, task), group in frame.groupby(["model", "task"], sort=False)
    ]


def tool_versions(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Tools with all versions that took part, by name."""
    pairs = sorted({pair for tools in frame["tools"] for pair in tools})
    names = dict.fromkeys(name for name, _ in pairs)
    return [(name, ", ".join(v for n, v in pairs if n == name)) for name in names]


def breakable(name: str) -> Markup:
    """A name that may be broken after its joints, so that tables fit on a phone."""
    parts = re.split(r"(?<=[+/_])", name)
    return Markup("<wbr>").join(parts)


def render(frame: pd.DataFrame, plan: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        breakable=breakable,
        size=show_bytes,
        share=show_share,
        time=show_seconds,
        value=show_value,
    )
    environment.globals.update(error=show_error, isna=pd.isna, known=known)
    groups = frame.groupby("model", sort=False)
    settings = [("Compressions", "compressions"), ("Adapters", "adapters")]
    settings += [("Calibration data", "calibrations")]
    return environment.get_template("report.html.j2").render(
        models=[
            model_section(name, group.to_dict("records"), i)
            for i, (name, group) in enumerate(groups, 1)
        ],
        settings=[(title, settings_table(plan[key])) for title, key in settings if plan.get(key)],
        evaluations=evaluation_summary(frame),
        tools=tool_versions(frame),
        base_marker=BASE_MARKER[1],
    )


def to_csv(frame: pd.DataFrame) -> str:
    """The summary as CSV text; a value that is not a number stays visible as nan or inf."""
    shown = frame[CSV_COLUMNS].assign(value=[str(float(v)) for v in frame["value"]])
    return shown.to_csv(index=False, lineterminator="\n")


def to_json(frame: pd.DataFrame) -> str:
    """The same rows as a JSON list; what is missing or no finite number is null."""
    return frame[CSV_COLUMNS].to_json(orient="records", indent=1, double_precision=15) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    # Not from `tempfile`: its files are private, and others may read a report.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(frame: pd.DataFrame, plan: Mapping[str, Any], out_dir: Path) -> None:
    """Write `summary.csv`, `summary.json` and `report.html` into `out_dir`."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = {
        "summary.csv": to_csv(frame),
        "summary.json": to_json(frame),
        "report.html": render(frame, plan),
    }
    for name, text in texts.items():
        write_text(out_dir / name, text)
