"""Which measured configuration to take, and which rank that was not measured is worth a run.

*Scale.* A task's score counts from 0, that of the model's worst compression without adapter, to 1,
the original's; perplexities by their logarithm. Several tasks count by their mean.

*Ranks in between.* The decomposition knows every layer's error at every rank. With e(r) the mean
over layers of the relative output error, ``sqrt(objective(r) / objective(0))``, the score is drawn
as straight lines over e through what was measured (rank 0: without adapter). How far that is off
is found by leaving measured ranks out, each in turn: the largest miss is what is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eora.report.comparing import linear

Curve = NDArray[np.float64]  # entry r: mean relative output error at rank r; descending from 1

# Ranks that kernels like.
_STEP = 8


@dataclass(frozen=True)
class Option:
    """One configuration.

    Attributes:
        name: the variant's name, as in the results.
        bytes: of all tensors.
        score: 0 to 1 as above; may leave that range.
        miss: None for what was measured; else how far off the prediction may be, nan if unknown.
    """

    name: str
    bytes: float
    score: float
    miss: float | None = None


def curve(residuals: Mapping[str, list[float]]) -> Curve:
    """e(r) of an adapter's layers; narrow layers count as repaired beyond their own width."""
    length = max(map(len, residuals.values()))
    layers = np.zeros((len(residuals), length))
    for row, values in zip(layers, residuals.values(), strict=True):
        if values[0] > 0:
            row[: len(values)] = np.sqrt(np.array(values) / values[0])
    return layers.mean(0)


def scores(frame: pd.DataFrame, tasks: Iterable[str]) -> dict[str, float]:
    """Variant -> score, of one model's rows (see :func:`eora.report.build`).

    A task on which no compression lost anything tells nothing and does not count. A variant that a
    task gave no number for has no score.
    """
    found: dict[str, list[float]] = {}
    for task in tasks:
        rows = frame[frame["task"] == task]
        sign = np.where(rows["higher_is_better"], 1, -1)
        scale = [linear(v, m) for v, m in zip(rows["value"], rows["metric"], strict=True)]
        value = pd.Series(sign * scale, index=rows["variant"])
        plain = rows[rows["adapter"].isna()]
        original = value[plain[plain["compression"].isna()]["variant"]]
        worst = value[plain[plain["compression"].notna()]["variant"]].min()
        if original.empty or not original.iloc[0] > worst:
            continue
        for variant, scored in ((value - worst) / (original.iloc[0] - worst)).items():
            found.setdefault(variant, []).append(scored)
    means = {variant: float(np.mean(values)) for variant, values in found.items()}
    return {variant: mean for variant, mean in means.items() if math.isfinite(mean)}


def predicted(ranks: Mapping[int, float], e: Curve, rank: int) -> float:
    """Score at ``rank`` from those measured (rank -> score, two or more); beyond the largest and
    below the smallest, the nearest line is drawn on."""
    known = sorted(ranks)
    above = next((i for i, r in enumerate(known) if r >= rank), len(known) - 1)
    low, high = known[max(0, above - 1)], known[max(1, above)]
    if e[low] == e[high]:
        return ranks[low]
    share = (e[low] - e[rank]) / (e[low] - e[high])
    return ranks[low] + share * (ranks[high] - ranks[low])


def miss(ranks: Mapping[int, float], e: Curve) -> float:
    """The largest error of :func:`predicted` at a measured rank that it was not told; nan if there
    is none between others."""
    inner = sorted(ranks)[1:-1]
    errors = [
        abs(ranks[out] - predicted({r: s for r, s in ranks.items() if r != out}, e, out))
        for out in inner
    ]
    return max(errors, default=math.nan)


def untested(frame: pd.DataFrame, scored: Mapping[str, float], curves: Mapping) -> list[Option]:
    """Ranks of measured families (one compression, adapter and bits) that were not run.

    curves: (compression, adapter) -> its curve.
    """
    found = []
    variants = frame.drop_duplicates("variant")
    families = variants.dropna(subset=["adapter"]).groupby(
        ["compression", "adapter", "adapter_bits"], sort=False
    )
    for (compression, adapter, bits), rows in families:
        rows = rows[rows["variant"].isin(scored)]
        # Of one made around an adapter, rank 0 is not measured.
        ranks = {0: scored[compression]} if compression in scored else {}
        ranks |= {int(r): scored[v] for r, v in zip(rows["rank"], rows["variant"], strict=True)}
        if len(ranks) < 2 or (compression, adapter) not in curves:
            continue
        e = curves[compression, adapter]
        largest = rows.loc[rows["rank"].idxmax()]
        a_rank = largest["adapter_bytes"] / largest["rank"]
        alone = largest["bytes"] - largest["adapter_bytes"]
        off = miss(ranks, e)
        for rank in range(_STEP, len(e), _STEP):
            if rank not in ranks:
                name = f"{compression}+{adapter}-r{rank}-{bits}bit"
                size = alone + rank * a_rank
                found.append(Option(name, size, predicted(ranks, e, rank), off))
    return found


def kept_curves(frame: pd.DataFrame) -> dict[tuple[str, str], Curve]:
    """(compression, adapter) -> curve, of one model's rows; of those adapters that keep theirs."""
    found = {}
    adapted = frame.dropna(subset=["adapter"])
    for row in adapted.drop_duplicates(["compression", "adapter"]).itertuples():
        if row.residuals is not None:
            found[row.compression, row.adapter] = curve(row.residuals)
    return found


def measured(frame: pd.DataFrame, scored: Mapping[str, float]) -> list[Option]:
    """What was run and has a score."""
    variants = frame.drop_duplicates("variant")
    sizes = zip(variants["variant"], variants["bytes"], strict=True)
    return [Option(name, size, scored[name]) for name, size in sizes if name in scored]


def best_within(options: list[Option], budget: float) -> Option | None:
    """The best option of at most so many bytes; of equals the smaller one."""
    fits = [option for option in options if option.bytes <= budget]
    return max(fits, key=lambda option: (option.score, -option.bytes), default=None)


def cheapest(options: list[Option], score: float) -> Option | None:
    """The smallest option that reaches a score."""
    enough = [option for option in options if option.score >= score]
    return min(enough, key=lambda option: (option.bytes, -option.score), default=None)
