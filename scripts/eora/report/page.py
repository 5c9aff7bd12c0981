"""The table and the page as files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eora.report import losses, residuals
from eora.report.comparing import CSV_COLUMNS, made_around
from eora.report.figures import BASE_MARKER, figure, looks
from eora.report.gaps import not_run
from eora.report.reading import Row, known, number
from eora.report.verdict import best_adapter, cost_sentences, ladder, lead
from eora.report.words import (
    distinct,
    show_bytes,
    show_error,
    show_seconds,
    show_setting,
    show_share,
    show_value,
)


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
        "residuals": residuals.figures(rows, f"r{index}-"),
        "losses": losses.figure(rows, f"l{index}-"),
        "table": table_rows(rows, tasks),
        "details": metric_rows(rows),
        "costs": cost_sentences(rows),
        "around": any(map(made_around, rows)),
        "prompt_tokens": distinct(r["prompt_tokens"] for r in rows),
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
            "planned": group["planned_memory_bytes"].max(),
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
        not_run=not_run(frame, plan),
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
