"""What a config did not ask for, and what it would take."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eora.report.words import joined

METHODS = ("eora", "diagonal", "svd")


def cut_tasks(frame: pd.DataFrame) -> list[str]:
    """Tasks of which only a part was asked."""
    known = frame.dropna(subset=["samples", "available"])
    cut = known[known["samples"] < known["available"]].drop_duplicates("task")
    return [
        f"{row.task}: {row.samples:,} of {row.available:,} samples were judged. "
        f"The rest: remove tasks.{row.task}.limit."
        for row in cut.itertuples()
    ]


def fitted_ranks(frame: pd.DataFrame) -> dict[str, int]:
    """Adapter -> the largest rank that a layer of every model has, by the curves kept."""
    kept = frame.dropna(subset=["adapter", "residuals"])
    most = kept["residuals"].map(lambda curves: max(map(len, curves.values())) - 1)
    return most.groupby(kept["adapter"]).min().to_dict()


def other_ranks(frame: pd.DataFrame, adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Adapters that are fitted to a larger rank than any that was judged."""
    fitted = fitted_ranks(frame)
    return [
        f"{name}: fitted up to rank {fitted[name]}, judged at "
        f"{joined([str(rank) for rank in sorted(entry['ranks'])])}. Any other "
        f"needs no new fit: add it to adapters.{name}.ranks."
        for name, entry in adapters.items()
        if name in fitted and max(entry["ranks"]) < fitted[name]
    ]


def other_bits(adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Adapters that were judged in 16 bits alone."""
    return [
        f"{name}: judged in 16 bits alone. In 4 bits an adapter takes about a quarter of the bytes:"
        f" add 4 to adapters.{name}.bits."
        for name, entry in adapters.items()
        if entry.get("bits") == [16] and "tune" not in entry
    ]


def other_methods(adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Methods that no adapter was fitted by."""
    absent = [m for m in METHODS if m not in {entry.get("method") for entry in adapters.values()}]
    if not adapters or not absent:
        return []
    return [
        f"No adapter was fitted by {joined(absent)}. For a comparison at equal rank add an entry to"
        " adapters with that method: it shares the second moments."
    ]


def not_run(frame: pd.DataFrame, plan: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that a reader may look for and does not find."""
    adapters = plan.get("adapters", {})
    return [
        *cut_tasks(frame),
        *other_ranks(frame, adapters),
        *other_bits(adapters),
        *other_methods(adapters),
    ]
