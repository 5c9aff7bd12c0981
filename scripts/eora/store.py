"""A store of finished results: what was made once is restored, not computed again.

Snakemake runs all that follows from a job that runs, even where the job's result comes out the
same. The store makes that cheap: a stage whose recipe (stage, version, parameters, digests of its
inputs, tool versions: what its manifest says it was made from) equals that of an earlier result
gets that result. So going back to an earlier config is free too.

An entry is the folder ``{store}/{stage}/{digest of the recipe}``. Its files are hard links to
those of the result, and cost no room while the result is in use; its manifest is a copy. It
appears by one rename, so that it is whole or not there.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eora import manifest

NAME = ".store"
_log = logging.getLogger(__name__)


def _entry(store: Path, recipe: dict[str, Any]) -> Path:
    return store / recipe["stage"] / manifest.digest_of(recipe)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _link(source: Path, target: Path, skip: tuple[str, ...] = ()) -> None:
    """Hard-link a folder's files into another; the manifest, which may be touched, is copied."""
    for path in _files(source):
        name = path.relative_to(source)
        if name.parts[0] in skip:
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name == Path(manifest.NAME):
            shutil.copy2(path, place)
        else:
            os.link(path, place)


def _whole(entry: Path) -> bool:
    """Whether an entry's files still are what its manifest says.

    A file that was changed after the manifest was written (by an editor, through the link in the
    results) is read to be sure; the others are told by their size.
    """
    sealed = entry / manifest.NAME
    for name, told in manifest.load(entry)["outputs"].items():
        path = entry / name
        if not path.is_file() or path.stat().st_size != told["bytes"]:
            return False
        touched = path.stat().st_mtime_ns > sealed.stat().st_mtime_ns
        if touched and manifest.sha256(path) != told["sha256"]:
            return False
    return True


def _discard(entry: Path) -> None:
    """Remove an entry; from the first moment nobody finds it half."""
    grave = entry.with_name(f".gone-{secrets.token_hex(4)}-{entry.name}")
    entry.replace(grave)
    shutil.rmtree(grave)


def restore(store: Path, recipe: dict[str, Any], folder: Path) -> bool:
    """Put the kept result of this recipe into the empty ``folder``; False where there is none."""
    entry = _entry(store, recipe)
    try:
        if not (entry / manifest.NAME).is_file():
            return False
        if not _whole(entry):
            _log.warning("%s was changed since it was kept; it is dropped and made anew", entry)
            _discard(entry)
            return False
        _link(entry, folder)
    except OSError as error:  # pruned by another process meanwhile, or links are not to be had
        _log.warning("%s cannot be restored (%s); it is made anew", entry, error)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
    (folder / manifest.NAME).touch()
    _log.info("Restored from %s: the same parameters, inputs and versions as before.", entry)
    return True


def keep(store: Path, recipe: dict[str, Any], folder: Path, skip: tuple[str, ...] = ()) -> None:
    """Keep the sealed result in ``folder``, less the top-level names in ``skip``.

    Where the store already has a result of this recipe (another job made it meanwhile, or it was
    not to be trusted), the newer one takes its place.
    """
    entry = _entry(store, recipe)
    partial = entry.with_name(f".partial-{secrets.token_hex(4)}-{entry.name}")
    try:
        partial.mkdir(parents=True)
        _link(folder, partial, skip)
        if entry.exists():
            if manifest.digest(entry) != manifest.digest(partial):
                _log.warning("This result is not bit-identical to the one kept at %s.", entry)
            _discard(entry)
        partial.replace(entry)
    except OSError as error:
        # File systems without hard links, and two jobs that put the same entry at once.
        _log.warning("Not kept for restoring: %s", error)
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Kept:
    """An entry of the store: its stage, what its files take, and what removing it frees."""

    path: Path
    stage: str
    bytes: int
    freed: int


def entries(store: Path) -> Iterator[Kept]:
    """All entries, and what killed jobs left of some (stage ``""``)."""
    for path in sorted(store.glob("*/*")) if store.is_dir() else ():
        stats = [file.stat() for file in _files(path) if file.name != manifest.NAME]
        yield Kept(
            path,
            "" if path.name.startswith(".") else path.parent.name,
            sum(stat.st_size for stat in stats),
            sum(stat.st_size for stat in stats if stat.st_nlink == 1),
        )
