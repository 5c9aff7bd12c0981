"""The stages: where each puts its result, what of the config changes it, and which are asked for.

One place for what the rules, ``status`` and ``clean_orphans`` must agree on. A stage's parameters
are one dict with exactly the keys that change its result, defaults filled in, and the stage's
version. What only changes how a job runs (device, batch size, threads) is not among them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eora.config import (
    Config,
    Variant,
    calibrated_on_compressed,
    integers,
    is_gguf,
    origin,
    pick,
    settings,
    shares,
    variants,
)

Params = dict[str, Any]

SOURCE_KEYS = ("hub", "revision", "wheel", "sha256", "member", "path")
DATASET_KEYS = (*SOURCE_KEYS, "name", "data_files", "split", "distinct", "rows")
CALIBRATION_KEYS = ("samples", "seqlen", "layout")
LM_EVAL_KEYS = ("num_fewshot", "limit", "chat_template")


@cache
def fingerprint(path: Path, samples: int = 64, block: int = 1 << 16) -> str:
    """Digest of a file's content; of large files, of size, time stamp and blocks spread over it.

    So a changed file is seen before any job runs and without reading a model's gigabytes; a small
    one whatever its time stamp says.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        if (size := path.stat().st_size) <= samples * block:
            found.update(file.read())
        else:
            found.update(f"{size} {path.stat().st_mtime_ns}".encode())
            for i in range(samples):
                file.seek(i * (size - block) // (samples - 1))
                found.update(file.read(block))
    return found.hexdigest()


def _source(entry: Config, keys: tuple[str, ...], files: str = "*") -> Params:
    """Tracked part of a source. A local path is tracked by its files, not by where it lies.

    Args:
        entry: of the config.
        keys: of the entry.
        files: pattern of those of a local folder that count.
    """
    picked = pick(entry, keys)
    if "path" in picked:
        path = Path(picked["path"]).expanduser()
        base = path if path.is_dir() else path.parent
        found = sorted(p for p in path.glob(files) if p.is_file()) if path.is_dir() else [path]
        picked["path"] = path.name
        picked["files"] = {str(file.relative_to(base)): fingerprint(file) for file in found}
    return picked


def _trust(config: Config, model: str) -> Params:
    """The model's own permission to run its code; a key only where it is given."""
    return {"trust_remote_code": True} if config["models"][model]["trust_remote_code"] else {}


def _download_model(config: Config, model: str) -> Params:
    entry = config["models"][model]
    dtype = pick(entry, ("dtype",)) if is_gguf(entry) else {}  # other weights stay as they are
    return {"source": _source(entry, SOURCE_KEYS), **dtype, **_trust(config, model)}


def _download_checkpoint(config: Config, model: str, compression: str) -> Params:
    source = _source(config["compressions"][compression]["checkpoint"], SOURCE_KEYS)
    return {"source": source, **_trust(config, model)}


def _download_dataset(config: Config, dataset: str) -> Params:
    # Saved data sets of several splits have a folder for each.
    return {"source": _source(config["datasets"][dataset], DATASET_KEYS, "**/*")}


def _prepare_task(config: Config, task: str) -> Params:
    entry = config["tasks"][task]
    return {"lm_eval": entry["lm_eval"], "download": "dataset" not in entry}


def _tokenize(config: Config, model: str, calibration: str) -> Params:
    entry = config["calibrations"][calibration]
    if "mix" in entry:
        texts = {
            "mix": {
                dataset: {"column": config["datasets"][dataset]["text"], "samples": samples}
                for dataset, samples in shares(entry).items()
            }
        }
    else:
        texts = {"column": config["datasets"][entry["dataset"]]["text"]}
    return {**texts, **pick(entry, CALIBRATION_KEYS), **_trust(config, model)}


def _compress(config: Config, model: str, compression: str) -> Params:
    entry = config["compressions"][compression]
    made = {"method": entry["method"]} if entry["method"] == "existing" else settings(entry)
    return {**made, **_trust(config, model)}


def _covariance(
    config: Config,
    model: str,
    calibration: str,
    shard: str,
    shards: str,
    compression: str | None = None,
) -> Params:
    return {
        **pick(config["covariance"], ("expert_tokens", "tf32")),
        "shard": int(shard),
        "shards": int(shards),
        **_trust(config, model),
    }


def _decompose(
    config: Config, model: str, compression: str, adapter: str, shard: str, shards: str
) -> Params:
    entry = config["adapters"][adapter]
    keys = ("method", "max_rank", *(["calibrate_on"] if calibrated_on_compressed(entry) else []))
    return {
        **pick(entry, keys),
        "shard": int(shard),
        "shards": int(shards),
        **_trust(config, model),
    }


def _adapter(config: Config, model: str, compression: str, adapter: str, rank: str) -> Params:
    return {"rank": int(rank), "base_model": origin(config["models"][model])}


def _quantize_adapter(
    config: Config, model: str, compression: str, adapter: str, rank: str, bits: str
) -> Params:
    return {
        "bits": int(bits),
        "group_size": config["adapters"][adapter]["group_size"],
        "base_model": origin(config["models"][model]),
    }


def _tune_adapter(config: Config, model: str, compression: str, adapter: str, rank: str) -> Params:
    keys = ("steps", "batch_size", "learning_rate", "start", "seed")
    tuned = pick(config["adapters"][adapter]["tune"], keys)
    return {**tuned, "base_model": origin(config["models"][model]), **_trust(config, model)}


def _evaluate(config: Config, model: str, variant: str, task: str) -> Params:
    entry = config["tasks"][task]
    if "lm_eval" in entry:
        keys = {"kind": "lm_eval", "name": entry["lm_eval"], **pick(entry, LM_EVAL_KEYS)}
    else:
        column = config["datasets"][entry["perplexity"]]["text"]
        keys = {
            "kind": "perplexity",
            "column": column,
            **pick(entry, ("window", "windows", "join")),
        }
    return {**keys, **_trust(config, model)}


@dataclass(frozen=True)
class Stage:
    """A stage's place and parameters.

    Attributes:
        folder: its results' folder below the results folder, with its wildcards.
        version: raised when the stage's algorithm changes: its results and what follows are remade.
        keys: (config, wildcards by name) -> what of the config changes its result.
        product: what lies beside its manifest that the user is after, if it is not only a step.
    """

    folder: str
    version: int
    keys: Callable[..., Params]
    product: str | None = None


_COVARIANCE_VERSION = 3  # one algorithm, whichever model it runs
STAGES = {
    "download_model": Stage("models/{model}", 1, _download_model),
    "download_dataset": Stage("datasets/{dataset}", 1, _download_dataset),
    "download_checkpoint": Stage("checkpoints/{model}/{compression}", 1, _download_checkpoint),
    "prepare_task": Stage("tasks/{task}", 1, _prepare_task),
    "tokenize": Stage("tokens/{model}/{calibration}", 1, _tokenize),
    "compress": Stage("compressed/{model}/{compression}", 1, _compress, "model"),
    "covariance": Stage(
        "covariance/{model}/{calibration}/{shard}-of-{shards}", _COVARIANCE_VERSION, _covariance
    ),
    "compressed_covariance": Stage(
        "covariance/{model}/{compression}/{calibration}/{shard}-of-{shards}",
        _COVARIANCE_VERSION,
        _covariance,
    ),
    "decompose": Stage(
        "decompositions/{model}/{compression}/{adapter}/{shard}-of-{shards}", 3, _decompose
    ),
    "adapter": Stage(
        "adapters/{model}/{compression}/{adapter}/r{rank}-16bit", 2, _adapter, "adapter"
    ),
    "quantize_adapter": Stage(
        "adapters/{model}/{compression}/{adapter}/r{rank}-{bits}bit",
        2,
        _quantize_adapter,
        "adapter",
    ),
    "tune_adapter": Stage(
        "adapters/{model}/{compression}/{adapter}/r{rank}-tuned", 1, _tune_adapter, "adapter"
    ),
    "evaluate": Stage("evaluations/{model}/{variant}/{task}", 2, _evaluate, "results.json"),
}
REPORT_VERSION = 3


def params(config: Config, stage: str, wildcards: Mapping[str, str]) -> Params:
    """What a stage's result depends on, beside its inputs: the ``--params`` of its script."""
    entry = STAGES[stage]
    return {**entry.keys(config, **wildcards), "version": entry.version}


def report_params(config: Config) -> Params:
    """Everything that the report says of the config."""
    return {
        "variants": [variant.row() for variant in variants(config)],
        "tasks": list(config["tasks"]),
        "metrics": {task: entry.get("metric") for task, entry in config["tasks"].items()},
        "compressions": {
            name: pick(settings(integers(config["compressions"], name)), ("bits", "group_size"))
            | settings(entry)
            | pick(entry, ("calibration",))
            for name, entry in config["compressions"].items()
        },
        **{key: config[key] for key in ("adapters", "calibrations")},
        "version": REPORT_VERSION,
    }


@dataclass(frozen=True)
class Place:
    """One result: its stage and the wildcards of the stage's folder, by name."""

    stage: str
    wildcards: tuple[tuple[str, str], ...]

    @property
    def folder(self) -> str:
        """Where it lies, below the results folder."""
        return STAGES[self.stage].folder.format(**dict(self.wildcards))

    @property
    def product(self) -> str | None:
        """Name of what the user is after in it, if anything."""
        return STAGES[self.stage].product


def place(stage: str, **wildcards: Any) -> Place:
    """The result of a stage for these wildcards."""
    return Place(stage, tuple(sorted((key, str(value)) for key, value in wildcards.items())))


def _data_of(config: Config, task: Config) -> Iterator[Place]:
    for key in ("dataset", "fewshot_dataset", "perplexity"):
        if key in task:
            yield place("download_dataset", dataset=task[key])


def _calibrated(config: Config, model: str, calibration: str) -> Iterator[Place]:
    for dataset in shares(config["calibrations"][calibration]):
        yield place("download_dataset", dataset=dataset)
    yield place("tokenize", model=model, calibration=calibration)


def parts(config: Config) -> list[dict[str, int]]:
    """The wildcards of each shard of a model."""
    number = config["covariance"]["shards"]
    return [{"shard": shard, "shards": number} for shard in range(number)]


def _moments(config: Config, model: str, calibration: str) -> Iterator[Place]:
    yield from _calibrated(config, model, calibration)
    for part in parts(config):
        yield place("covariance", model=model, calibration=calibration, **part)


def fitted_in(config: Config, model: str, compression: str, adapter: str, **part: Any) -> Place:
    """The second moments that a shard of an adapter is fitted in."""
    entry = config["adapters"][adapter]
    names = {"model": model, "calibration": entry["calibration"], **part}
    if calibrated_on_compressed(entry):
        return place("compressed_covariance", compression=compression, **names)
    return place("covariance", **names)


def rounded_around(config: Config, model: str, compression: str) -> Variant:
    """The compensated model whose adapter a compression is rounded around."""
    around = config["compressions"][compression]["around"]
    return Variant(model, around["compression"], around["adapter"], around["rank"], around["bits"])


def _behind(config: Config, variant: Variant) -> Iterator[Place]:
    """All results that a variant is made of."""
    model, compression, adapter = variant.model, variant.compression, variant.adapter
    yield place("download_model", model=model)
    if compression is None:
        return
    entry = config["compressions"][compression]
    if "checkpoint" in entry:
        yield place("download_checkpoint", model=model, compression=compression)
    elif entry["method"] == "rescale":
        yield from _behind(config, Variant(model, entry["compression"]))
        yield from _moments(config, model, entry["calibration"])
    else:
        yield from _calibrated(config, model, entry["calibration"])
    if "around" in entry:
        yield from _behind(config, rounded_around(config, model, compression))
    yield place("compress", model=model, compression=compression)
    if adapter is None:
        return
    fitted = {"model": model, "compression": compression, "adapter": adapter}
    yield from _calibrated(config, model, config["adapters"][adapter]["calibration"])
    for part in parts(config):
        yield fitted_in(config, **fitted, **part)
    for part in parts(config):
        yield place("decompose", **fitted, **part)
    made = {**fitted, "rank": variant.rank}
    yield place("adapter", **made)
    if variant.adapter_bits != 16:
        yield place("quantize_adapter", **made, bits=variant.adapter_bits)
    if variant.tuned:
        yield from _calibrated(config, model, config["adapters"][adapter]["tune"]["calibration"])
        yield place("tune_adapter", **made)


def asked(config: Config) -> list[Place]:
    """Every result that the config asks for, each before what is made from it."""
    found: dict[Place, None] = {}
    for task, entry in config["tasks"].items():
        found.update(dict.fromkeys(_data_of(config, entry)))
        if "lm_eval" in entry:
            found[place("prepare_task", task=task)] = None
    judged = []
    for variant in variants(config):
        found.update(dict.fromkeys(_behind(config, variant)))
        judged += [
            place("evaluate", model=variant.model, variant=variant.name, task=task)
            for task in config["tasks"]
        ]
    return [*found, *judged]


def _pattern(stage: Stage) -> re.Pattern[str]:
    numbers = ("rank", "bits", "shard", "shards")
    parts = re.split(r"\{(\w+)\}", stage.folder)  # text, wildcard, text, wildcard, ...
    return re.compile(
        "".join(
            rf"(?P<{part}>{r'[0-9]+' if part in numbers else '[^/]+'})"
            if i % 2
            else re.escape(part)
            for i, part in enumerate(parts)
        )
    )


_PATTERNS = {name: _pattern(stage) for name, stage in STAGES.items()}


def place_of(folder: str) -> Place | None:
    """The result that lies in this folder below the results folder; None where none does."""
    for name, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(folder):
            return place(name, **match.groupdict())
    return None
