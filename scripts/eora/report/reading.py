"""What manifests and results say: one row for each variant of a model and task."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from eora.config import Variant, bare
from eora.errors import Mistake

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

Row = dict[str, Any]


def read_json(path: Path, what: str, kind: type = dict) -> Any:
    """Read a JSON object, or list; errors name `what` was wanted and the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mistake(f"{what} is missing: {path}; run its stage") from None
    except ValueError as error:
        raise Mistake(f"{what} is not JSON: {path}: {error}; remove it and run again") from None
    if not isinstance(found, kind):
        name = "object" if kind is dict else "list"
        raise Mistake(f"{what} is not a JSON {name}: {path}; remove it and run again")
    return found


def read_manifest(path: Path, what: str) -> dict[str, Any]:
    """Read a manifest that must list tensors, as a size of nothing would win every budget."""
    manifest = read_json(path, what)
    if not total_bytes(manifest):
        raise ValueError(f"{what} lists no tensors: {path}")
    return manifest


def tensors(manifest: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """All tensors that are loaded, as {(file, tensor name): {"dtype", "shape"}}.

    They lie in the result's ``model`` or ``adapter`` folder; files beside it tell other stages how
    it came about.
    """
    return {
        (file, name): tensor
        for file, inside in manifest.get("tensors", {}).items()
        for name, tensor in inside.items()
        if "/" in file
    }


def tensor_bytes(tensor: Mapping[str, Any]) -> int:
    """Bytes of one tensor's data, from shape and dtype."""
    dtype = tensor["dtype"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown tensor dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    return math.ceil(math.prod(tensor["shape"]) * DTYPE_BITS[dtype] / 8)


def total_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of all tensors of a manifest that are loaded."""
    return sum(tensor_bytes(tensor) for tensor in tensors(manifest).values())


def _layers(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Linear layer -> its weight, packed or not: of a numbered block, plain ones with two axes.

    By the names' shapes, as files of one model may call its blocks ``h.0`` or ``transformer.h.0``.
    """
    found = {}
    for (_, name), tensor in tensors(manifest).items():
        layer, _, last = name.rpartition(".")
        numbered = any(part.isdecimal() for part in layer.split("."))
        if numbered and last in WEIGHTS and (last != "weight" or len(tensor["shape"]) == 2):
            found[layer] = tensor
    return found


def bytes_by_part(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a model's weights in linear layers, packed or not, of what those are scaled by
    (scales, zero points, permutations), and of all else: embeddings, norms, biases.
    """
    layers = _layers(manifest)
    found = dict.fromkeys(("weight_bytes", "scale_bytes", "other_bytes"), 0)
    for (_, name), tensor in tensors(manifest).items():
        layer, _, last = name.rpartition(".")
        if layer not in layers or last == "bias":
            part = "other_bytes"
        else:
            part = "weight_bytes" if last in WEIGHTS else "scale_bytes"
        found[part] += tensor_bytes(tensor)
    return found


def effective_bits(
    original: Mapping[str, Any], model: Mapping[str, Any], adapter_bytes: int
) -> float | None:
    """Bits spent per original decoder weight: packed weights, scales, zeros and adapter."""
    count = sum(math.prod(weight["shape"]) for weight in _layers(original).values())
    parts = bytes_by_part(model)
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
    path = results / as_variant(variant).adapter_folder / "manifest.json"
    return Parts(original, compressed, read_manifest(path, "adapter manifest"))


def as_variant(row: Mapping[str, Any]) -> Variant:
    """The variant of a plan's row."""
    return Variant(**{key: value for key, value in row.items() if key != "variant"})


def read_residuals(folder: Path) -> dict[str, list[float]] | None:
    """An adapter's curves, layer -> the objective left at each rank; None where they are not kept.

    Args:
        folder: the 16-bit adapter's.
    """
    file = folder / "residuals.json"
    return read_json(file, "residual curves") if file.exists() else None


def variant_columns(parts: Parts, variant: Mapping[str, Any], plan: Mapping[str, Any]) -> Row:
    """The columns that are the same for all tasks of a variant."""
    held = parts.compressed or parts.original
    extra = total_bytes(parts.adapter) if parts.adapter is not None else None
    settings = plan.get("compressions", {}).get(variant["compression"]) or {}
    adapter = plan.get("adapters", {}).get(variant["adapter"]) or {}
    return {
        "model": variant["model"],
        "variant": variant["variant"],
        "compression": variant["compression"],
        "recovered_from": None
        if variant["adapter"] is None
        else bare(plan.get("compressions", {}), variant["compression"]),
        "bits": settings.get("bits"),
        "group_size": settings.get("group_size"),
        "adapter": variant["adapter"],
        "method": adapter.get("method"),
        "rank": variant["rank"],
        "adapter_bits": variant["adapter_bits"],
        "bytes": total_bytes(held) + (extra or 0),
        **bytes_by_part(held),
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
    memory = found.get("memory_bytes", {})
    return {
        "task": task,
        "metric": metric,
        "value": number(primary.get("value")),
        "stderr": number(primary.get("stderr")),
        "higher_is_better": primary["higher_is_better"],
        "samples": found.get("samples"),
        "available": found.get("available"),
        "seconds": found.get("seconds"),
        "loading_memory_bytes": memory.get("loading"),
        "prompt_memory_bytes": memory.get("prompt"),
        "prompt_tokens": found.get("prompt_tokens"),
        "peak_memory_bytes": found.get("peak_memory_bytes"),
        "planned_memory_bytes": found.get("planned_memory_bytes"),
        "device": found.get("device"),
        "dtype": found.get("dtype"),
        "metrics": metrics,
        "each": read_json(path.with_name("samples.json"), "samples").get(metric),
        "tools": [(name, str(version)) for name, version in found.get("versions", {}).items()],
    }


def variant_rows(results: Path, variant: Mapping[str, Any], plan: Mapping[str, Any]) -> list[Row]:
    """One row per task for one variant of the plan."""
    shared = variant_columns(read_parts(results, variant), variant, plan)
    shared["residuals"] = None
    shared["losses"] = None
    if variant["adapter"] is not None:
        mine = as_variant(variant)
        shared["residuals"] = read_residuals(results / mine.fitted.adapter_folder)
        if mine.tuned:
            file = results / mine.adapter_folder / "losses.json"
            shared["losses"] = read_json(file, "losses of fine-tuning", list)
    folder = results / "evaluations" / variant["model"] / variant["variant"]
    wanted = plan.get("metrics", {})
    rows = [
        (task, task_columns(folder / task / "results.json", task, wanted.get(task)))
        for task in plan["tasks"]
    ]
    return [{**shared, **row, "tools": shared["tools"] + row["tools"]} for _, row in rows]
