"""Manifests: what a stage made, from what, and with what.

A stage writes its big files into a folder beside a small ``manifest.json``. The manifest holds no
time and no path outside its own folder: the same inputs and parameters give the same manifest, and
downstream rules, which track the manifest and not the big files, rerun only for a real change.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
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
    """Name -> {dtype, shape, data_offsets} of a safetensors file, from its header alone (no torch).

    The offsets are a tensor's bytes [start, end) in the file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + size + offset for offset in entry["data_offsets"]]
    return header


def tensor_shapes(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape} of a safetensors file: of its header, what a result is known by."""
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"]}
        for name, entry in safetensors_header(path).items()
    }


Manifest = dict[str, Any]


def load(path: Path) -> Manifest:
    """The manifest at ``path`` (the file, or the folder that holds it)."""
    path = Path(path)
    return json.loads((path / NAME if path.is_dir() else path).read_text())


def digest_of(value: Any) -> str:
    """Hex digest of a value that JSON can hold."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest(path: Path) -> str:
    """One digest of names and contents of what a stage made.

    ``path`` is the stage's folder or manifest, for all of it, or what lies beside the
    manifest: a folder or a file.
    """
    if path.name == NAME or (path / NAME).is_file():
        return digest_of(load(path)["outputs"])
    outputs = load(path.parent)["outputs"]
    return digest_of({k: v for k, v in outputs.items() if k.split("/")[0] == path.name})


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
            shapes[name] = tensor_shapes(path)
    return outputs, shapes


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


def seal(
    folder: Path, recipe: Manifest, skip: tuple[str, ...] = (), notes: dict[str, Any] | None = None
) -> None:
    """Write the manifest of what is in ``folder``, as its last file.

    Args:
        folder: the stage's files.
        recipe: what they were made from and with.
        skip: top-level names that the manifest leaves out.
        notes: further facts for the manifest.
    """
    outputs, shapes = _describe(folder, skip)
    content = {
        **recipe,
        "outputs": outputs,
        "tensors": shapes,
        **({"notes": notes} if notes else {}),
    }
    (folder / NAME).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
