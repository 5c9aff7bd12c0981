"""The answer in words: which adapter, at which size, and where none pays."""

import math

import pandas as pd
from markupsafe import Markup

from eora.report.comparing import base_row, best_for_size, is_noise, made_around
from eora.report.reading import Row
from eora.report.words import NBSP, joined, show_bytes, show_share, show_value

# An adapter that keeps this share of the best one's gain is "nearly as good".
NEARLY = 0.9

# Rows in the table of the best variants by budget.
MOST_BUDGETS = 9


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
    of = f"of {row['recovered_from']} " if made_around(row) else ""
    loss = Markup("of the loss {}").format(of)
    return Markup("{} {}on {}{}").format(
        show_share(row["recovered"]) if row["recovered"] <= 1 else "more than all",
        loss if first else "",
        row["task"],
        " (within noise)" if is_noise(row, compressed) else "",
    )


def best_adapter(rows: list[Row], compression: str) -> Markup | None:
    """What the best adapter of a compression wins back and costs, and a smaller one as good."""
    adapted = [r for r in rows if r["compression"] == compression and not pd.isna(r["adapter"])]
    if not adapted:
        return None
    means, bare = mean_recovered(adapted), adapted[0]["recovered_from"]
    if not means:
        return Markup(
            "<strong>{}</strong> loses nothing that could be measured, so an adapter has nothing"
            " to win back."
        ).format(bare)
    extra = {r["variant"]: r["adapter_bytes"] for r in adapted}
    best = min(means, key=lambda v: (-means[v], extra[v], v))
    mine = [r for r in adapted if r["variant"] == best and not pd.isna(r["recovered"])]
    plain = {r["task"]: r for r in rows if r["compression"] == bare and pd.isna(r["adapter"])}
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
