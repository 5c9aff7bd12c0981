"""Manifests: what a stage made, from what, with what; and publishing results atomically.

A stage writes its big files into a folder beside a small ``manifest.json``. The manifest is
written last and by rename, so that its presence means that everything it names is whole. It holds
no time and no path outside its own folder: the same inputs and parameters give the same manifest,
and downstream rules, which track the manifest and not the big files, rerun only for a real change.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def canonical(value: Any) -> str:
    """JSON text that is equal exactly when the values are: keys sorted, no spare white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(path: Path) -> str:
    """Hex digest of a file's content, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape} of a safetensors file, read from its header alone (no torch)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()
    }


Manifest = dict[str, Any]


def load(path: Path) -> Manifest:
    """The manifest at ``path`` (the file, or the folder that holds it)."""
    path = Path(path)
    return json.loads((path / NAME if path.is_dir() else path).read_text())


def digest(path: Path) -> str:
    """One digest of everything that the manifest's stage made (its outputs' names and contents)."""
    outputs = load(path)["outputs"]
    return hashlib.sha256(canonical(outputs).encode()).hexdigest()


def tensors(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """All tensors that the manifest's files hold: name -> {dtype, shape}."""
    return {
        name: entry for file in manifest.get("tensors", {}).values() for name, entry in file.items()
    }


def _describe(folder: Path, skip: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    outputs, shapes = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in skip:
            continue
        outputs[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        if path.suffix == ".safetensors":
            shapes[name] = safetensors_header(path)
    return outputs, shapes


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


@contextmanager
def publish(
    out: Path,
    *,
    stage: str,
    params: dict[str, Any],
    inputs: dict[str, Path] | None = None,
    tools: tuple[str, ...] = (),
    volatile: tuple[str, ...] = (),
    notes: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder to fill; on success move its content into ``out`` and seal it.

    Args:
        out: the stage's output folder; what an earlier run left in it under the same names goes.
        stage: the stage's name.
        params: everything of the config that changes the result, with the stage's ``version``.
        inputs: name -> manifest (file or folder) of what the result was made from.
        tools: installed packages whose versions are recorded.
        volatile: top-level names left out of the manifest: measurements that differ from run to
            run, or files that a later stage deletes.
        notes: further facts for the manifest; may be filled while the context is open.

    A job that dies inside the context leaves ``out`` without a manifest, never with a half one.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / NAME).unlink(missing_ok=True)
    for stray in out.glob(".partial-*"):  # left by a job that was killed
        shutil.rmtree(stray)
    partial = out / f".partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        outputs, shapes = _describe(partial, volatile)
        content = {
            "stage": stage,
            "version": params.get("version"),
            "params": params,
            "inputs": {name: digest(path) for name, path in (inputs or {}).items()},
            "outputs": outputs,
            "tensors": shapes,
            "tools": versions(tools),
            **({"notes": notes} if notes else {}),
        }
        sealed = partial / NAME
        sealed.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        for path in sorted(partial.iterdir()):
            if path == sealed:
                continue
            target = out / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)
        sealed.replace(out / NAME)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
