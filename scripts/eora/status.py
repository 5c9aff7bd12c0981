"""What a config's results are: done, missing or stale, and because of which key.

Which jobs a run would start is Snakemake's own word: its summary of all outputs is of the graph
that its dry run has. Why, is read from the manifests, which hold what each result was made with.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from eora import manifest, stages
from eora.config import Config, variants
from eora.stages import Place

# Snakemake's words for an output, and ours for why its job runs.
_REASONS = {
    "updated input files": "the files that it was made from were changed",
    "set of input files changed": "it is made from other files",
    "params changed": "its parameters were changed",
    "rule implementation changed": "its rule was changed",
}


@dataclass
class Job:
    """One job of the graph.

    Attributes:
        rule: its name.
        folder: where its result lies, below the results folder.
        place: the same, taken apart; None for a rule that is no stage (report, check_model).
        runs: whether the next run starts it.
        state: done, missing (nothing is there), stale (something that it depends on was changed),
            follows (made again only because of a job before it; restored where that gives the
            same), or differs (made with other parameters, and Snakemake does not know).
        why: for stale and differs, the keys: old value -> new value.
    """

    rule: str
    folder: str
    place: Place | None
    runs: bool
    state: str
    why: list[str] = field(default_factory=list)


def jobs(config: Config, outputs: Iterable[dict[str, str]]) -> list[Job]:
    """All jobs of the config's graph, in no order.

    Args:
        config: the checked config.
        outputs: Snakemake's detailed summary: for each output file, among others, output_file,
            rule, input-file(s), status and plan.
    """
    results = Path(config["results"])
    rows = defaultdict(list)
    for row in outputs:
        path = Path(row["output_file"]).relative_to(results)
        found = (stages.place_of(folder.as_posix()) for folder in path.parents)
        place = next((p for p in found if p is not None and p.stage == row["rule"]), None)
        where = place.folder if place is not None else path.parent.as_posix()
        rows[row["rule"], where, place].append(row)
    return [
        _job(config, results, rule, folder, place, some)
        for (rule, folder, place), some in rows.items()
    ]


def _job(
    config: Config,
    results: Path,
    rule: str,
    folder: str,
    place: Place | None,
    rows: list[dict[str, str]],
) -> Job:
    runs = any(row["plan"] == "update pending" for row in rows)
    told = {row["status"] for row in rows}
    why = [] if place is None else list(_changed(config, results, place))
    if not runs:
        return Job(rule, folder, place, runs, "differs" if why else "done", why)
    if "missing" in told:
        return Job(rule, folder, place, runs, "missing")
    reasons = told & set(_REASONS)
    if not reasons:
        return Job(rule, folder, place, runs, "follows")
    # Snakemake tells one reason of several: other inputs may be newer, or have other parameters.
    if place is not None:
        why += _other_inputs(config, place, rows[0]["input-file(s)"].split(","), results)
    why = why or [_REASONS[reason] for reason in sorted(reasons)]
    return Job(rule, folder, place, runs, "stale", why)


def _flat(value: Any, *above: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, *above, key)
    else:
        yield "/".join(above), value


def _changed(config: Config, results: Path, place: Place) -> Iterator[str]:
    """The keys whose values differ from those that the result was made with."""
    made = results / place.folder / manifest.NAME
    if not made.is_file():
        return
    old = dict(_flat(manifest.load(made)["params"]))
    new = dict(_flat(stages.params(config, place.stage, dict(place.wildcards))))
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if key.startswith("source/files/"):
            if before != after:
                yield f"{_key(config, place, 'path')}: {key.rpartition('/')[2]} was changed"
        # Beside what it was given, a stage notes the keys that it has no use for: as null or false.
        elif before != after and (key in new or before not in (None, False)):
            yield f"{_key(config, place, key)}: {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


# Where in the config a stage's keys are; "version" and a few others are elsewhere.
_SECTIONS = {
    "download_model": "models.{model}",
    "download_checkpoint": "compressions.{compression}.checkpoint",
    "download_dataset": "datasets.{dataset}",
    "prepare_task": "tasks.{task}",
    "tokenize": "calibrations.{calibration}",
    "compress": "compressions.{compression}",
    "covariance": "covariance",
    "compressed_covariance": "covariance",
    "decompose": "adapters.{adapter}",
    "adapter": "adapters.{adapter}",
    "quantize_adapter": "adapters.{adapter}",
    "tune_adapter": "adapters.{adapter}.tune",
    "evaluate": "tasks.{task}",
}


def _key(config: Config, place: Place, key: str) -> str:
    """The config's key, dotted, that a stage's parameter comes from."""
    names = dict(place.wildcards)
    if key == "version":
        return f"version of stage {place.stage}"
    if key in ("trust_remote_code", "base_model"):
        return f"models.{names['model']}" + (f".{key}" if key == "trust_remote_code" else "")
    if key == "column":
        task = config["tasks"].get(names.get("task"), {})
        calibration = config["calibrations"].get(names.get("calibration"), {})
        dataset = task.get("perplexity") or calibration.get("dataset")
        return f"datasets.{dataset}.text" if dataset else f"calibrations.{names['calibration']}.mix"
    renamed = {"name": "lm_eval", "download": "dataset", "kind": "lm_eval"}
    last = key.removeprefix("source/").replace("/", ".")
    if place.stage in ("evaluate", "prepare_task"):
        last = renamed.get(last, last)
    return f"{_SECTIONS[place.stage].format(**names)}.{last}"


# Keys that name another entry: stage -> (stages of the input, their wildcard, the keys).
_REFERENCES = {
    "tokenize": (("download_dataset",), "dataset", ("dataset",)),
    "compress": (("tokenize",), "calibration", ("calibration",)),
    "decompose": (("covariance", "compressed_covariance"), "calibration", ("calibration",)),
    "tune_adapter": (("tokenize",), "calibration", ("calibration",)),
    "evaluate": (("download_dataset",), "dataset", ("dataset", "fewshot_dataset", "perplexity")),
}


def _other_inputs(config: Config, place: Place, inputs: list[str], results: Path) -> Iterator[str]:
    """The reference whose entry is another one than that which the result was made from."""
    if place.stage not in _REFERENCES:
        return
    kinds, wildcard, keys = _REFERENCES[place.stage]
    old = set()
    for text in inputs:
        path = Path(text)
        if path.name == manifest.NAME and path.is_relative_to(results):
            found = stages.place_of(path.parent.relative_to(results).as_posix())
            if found is not None and found.stage in kinds:
                old.add(dict(found.wildcards)[wildcard])
    parts = [part.format(**dict(place.wildcards)) for part in _SECTIONS[place.stage].split(".")]
    entry = reduce(getitem, parts, config)
    new = {key: entry[key] for key in keys if key in entry}
    for key, value in new.items():
        if value not in old:
            gone = ", ".join(sorted(old - set(new.values()))) or "-"
            yield f"{'.'.join(parts)}.{key}: {gone} -> {value}"


Row = tuple[str, str, str]  # model (or data set, task), compression, adapter with rank

_COLUMNS = {
    "download_model": "fetch",
    "download_checkpoint": "fetch",
    "download_dataset": "fetch",
    "prepare_task": "fetch",
    "tokenize": "tokenize",
    "covariance": "covariance",
    "compressed_covariance": "covariance",
    "compress": "compress",
    "decompose": "decompose",
    "adapter": "adapter",
    "quantize_adapter": "low-bit",
    "tune_adapter": "tune",
    "evaluate": "evaluate",
}
COLUMNS = tuple(dict.fromkeys(_COLUMNS.values()))


def table(config: Config, found: list[Job]) -> dict[Row, dict[str, Counter[str]]]:
    """(model, compression, rank) -> stage -> how many results are in which state."""
    known = {(variant.model, variant.name): variant for variant in variants(config)}
    rows: dict[Row, dict[str, Counter[str]]] = {}
    ordered = {place: i for i, place in enumerate(stages.asked(config))}
    for job in sorted(found, key=lambda job: ordered.get(job.place, len(ordered))):
        if job.place is None:
            continue
        names = dict(job.place.wildcards)
        if "variant" in names:
            variant = known[names["model"], names["variant"]]
            adapter = "" if variant.adapter is None else f"{variant.adapter} r{variant.rank}"
            row = (variant.model, variant.compression or "", adapter)
        elif "model" in names:
            rank = f" r{names['rank']}" if "rank" in names else ""
            row = (names["model"], names.get("compression", ""), names.get("adapter", "") + rank)
        else:
            kind = "data set" if "dataset" in names else "task"
            row = (f"{kind} {names.get('dataset') or names['task']}", "", "")
        cells = rows.setdefault(row, {})
        cells.setdefault(_COLUMNS[job.rule], Counter())[job.state] += 1
    order = {name: i for i, name in enumerate(config["models"], 1)}
    return dict(sorted(rows.items(), key=lambda item: order.get(item[0][0], 0)))
