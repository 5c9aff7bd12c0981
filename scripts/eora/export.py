"""What leaves the workflow: adapter folders with a card, and dense checkpoints with it merged in.

Everything on a card is read from manifests and results; nothing is computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eora import config, manifest
from eora.errors import Mistake

CARD = "README.md"
# What of a compression's parameters tells it apart; the others are the run's own.
_COMPRESSION = (
    "method", "sparsity", "bits", "group_size", "sym", "format", "iters", "alg_ext"
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One adapter among the workflow's results.

    Attributes:
        results: the workflow's results folder.
        variant: which model, compression, adapter, rank and bits it is.
    """

    results: Path
    variant: config.Variant

    @classmethod
    def of(cls, folder: Path) -> Source:
        """From the adapter stage's folder, ``results/adapters/{model}/{compression}/{adapter}/r..``

        Raises:
            Mistake: it is no such folder.
        """
        parts = folder.resolve().parts
        rank, _, form = parts[-1].removeprefix("r").partition("-")
        bits = "16" if form == "tuned" else form.removesuffix("bit")
        if len(parts) < 6 or parts[-5] != "adapters" or not (rank.isdigit() and bits.isdigit()):
            raise Mistake(
                f"{folder} is no adapter of the workflow: name one such as "
                "results/adapters/<model>/<compression>/<adapter>/r64-16bit"
            )
        variant = config.Variant(*parts[-4:-1], int(rank), int(bits), form == "tuned")
        return cls(Path(*parts[:-5]), variant)

    @property
    def adapter(self) -> Path:
        return self.results / self.variant.adapter_folder

    @property
    def compressed(self) -> Path:
        return self.results / self.variant.model_folder

    @property
    def original(self) -> Path:
        return self.results / "models" / self.variant.model


def _made_from(results: Path, stage: str, digest: str) -> Path | None:
    """The folder of a stage's result that has this digest; None if it is not there any more."""
    for path in sorted(results.glob(f"{stage}/**/{manifest.NAME}")):
        if manifest.digest(path) == digest:
            return path.parent
    return None


def _fitted_on(source: Source) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Parameters of an adapter's fit, of its calibration samples, and their data sets' names."""
    place = source.variant
    fits = source.results / "decompositions" / place.model / place.compression / place.adapter
    first = next(iter(sorted(fits.glob(f"*/{manifest.NAME}"))), None)
    if first is None:
        raise Mistake(f"{fits}: no {manifest.NAME} in it; run the workflow again")
    fit = manifest.load(first)
    moments = _made_from(source.results, f"covariance/{place.model}", fit["inputs"]["moments"])
    if moments is None:
        return fit["params"], {}, "?"
    tokens_digest = manifest.load(moments)["inputs"]["tokens"]
    tokens = _made_from(source.results, f"tokens/{place.model}", tokens_digest)
    if tokens is None:
        return fit["params"], {}, "?"
    made = manifest.load(tokens)
    datasets = [digest for key, digest in made["inputs"].items() if key.startswith("dataset")]
    found = [_made_from(source.results, "datasets", digest) for digest in datasets]
    names = ["?" if data is None else data.name for data in found]
    return fit["params"], made["params"], " and ".join(names)


def _compressions(source: Source) -> dict[str, manifest.Manifest]:
    """The manifests of the compression and of those that it was made from in turn, by name."""
    found: dict[str, manifest.Manifest] = {}
    folder = source.results / "compressed" / source.variant.model
    name = source.variant.compression
    while name is not None and (made := folder / name / manifest.NAME).is_file():
        found[name] = manifest.load(made)
        name = config.made_from(found[name]["params"])
    return found


def _checkpoint(source: Source, compression: str) -> dict[str, str]:
    """Where the compressed model was taken from, if somebody else made it."""
    made = source.results / "checkpoints" / source.variant.model / compression / manifest.NAME
    if not made.is_file():
        return {}
    taken = manifest.load(made)["params"]["source"]
    revision = f" at revision {taken['revision']}" if "revision" in taken else ""
    return {"checkpoint": config.origin(taken) + revision}


def _scores(source: Source, bare: str) -> Iterator[dict[str, Any]]:
    """A row for each task that the original, the compressed (``bare``) and the compensated model
    share."""
    place = source.variant
    judged = source.results / "evaluations" / place.model
    names = [
        config.Variant(place.model).name,
        config.Variant(place.model, bare).name,
        place.name,
    ]
    for folder in sorted((judged / place.name).glob("*")):
        files = [judged / name / folder.name / "results.json" for name in names]
        if not all(file.is_file() for file in files):
            continue
        found = [json.loads(file.read_text()) for file in files]
        metric = found[-1]["primary"]
        shown = []
        for result in found:
            entry = result["metrics"][metric]
            error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.3g}"
            shown.append(f"{entry['value']:.4g}{error}")
        yield {"task": folder.name, "metric": metric, "shown": shown}


def _weights(made: manifest.Manifest, folder: str) -> dict[str, dict[str, Any]]:
    """Name -> {sha256, bytes} of the safetensors files in one folder of a stage's result."""
    files = {Path(name): entry for name, entry in made["outputs"].items()}
    return {
        path.name: entry
        for path, entry in files.items()
        if path.parts[0] == folder and path.suffix == ".safetensors"
    }


def facts(source: Source) -> dict[str, Any]:
    """What an adapter's card tells."""
    adapter, compressed = manifest.load(source.adapter), manifest.load(source.compressed)
    made, weights = _compressions(source), _weights(compressed, "model")
    params = {name: entry["params"] for name, entry in made.items()}
    bare = config.bare(params, source.variant.compression)
    whole = config.integers(params, source.variant.compression)
    first = next(name for name, entry in params.items() if entry is whole)
    fit, calibration, dataset = _fitted_on(source)
    licences = sorted(path.name for path in (source.original / "model").glob("LICENSE*"))
    return {
        "base": adapter["params"]["base_model"],
        "hub": "hub" in manifest.load(source.original)["params"]["source"],
        "licence": licences[0] if licences else None,
        "method": fit["method"],
        "inputs": fit.get("calibrate_on") or "original",
        "rank": source.variant.rank,
        "bits": source.variant.adapter_bits,
        "packed": source.variant.adapter_bits != 16,
        "tuned": adapter["params"] if source.variant.tuned else None,
        "bare": None if bare == source.variant.compression else bare,
        "compression": {key: whole[key] for key in _COMPRESSION if whole.get(key) is not None}
        | _checkpoint(source, first),
        "rescaled": first != source.variant.compression,
        "weights": {name: entry["sha256"] for name, entry in weights.items()},
        "bytes": sum(entry["bytes"] for entry in _weights(adapter, "adapter").values()),
        "base_bytes": sum(entry["bytes"] for entry in weights.values()),
        "calibration": {"samples": "?", "seqlen": "?", "layout": "?"} | calibration,
        "dataset": dataset,
        "tools": made[first]["tools"] | compressed["tools"] | adapter["tools"],
        "scores": list(_scores(source, bare)),
    }


def card(told: dict[str, Any]) -> str:
    """The model card of these facts, in the Hub's Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(told)


def export(source: Source, out: Path) -> None:
    """Fill a folder that a hub takes: the adapter's files, its card, the base model's licence."""
    hidden = shutil.ignore_patterns(".*")  # such as Snakemake's time stamps
    shutil.copytree(source.adapter / "adapter", out, ignore=hidden, dirs_exist_ok=True)
    for licence in (source.original / "model").glob("LICENSE*"):
        shutil.copy(licence, out)
    (out / CARD).write_text(card(facts(source)), encoding="utf-8")


def merge(source: Source, out: Path, trust_remote_code: bool = False) -> None:
    """Write the compensated model as a plain checkpoint: dequantized weights with B A added.

    It is as large as the original, and for runtimes that know nothing else. The whole model is in
    host memory at once.
    """
    from transformers import AutoConfig

    from eora import loading

    folder = source.compressed / "model"
    model, tokenizer = loading.load(folder, trust_remote_code=trust_remote_code)
    stored = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).dtype
    loading.merge(model, source.adapter / "adapter").to(stored).save_pretrained(out)
    tokenizer.save_pretrained(out)
