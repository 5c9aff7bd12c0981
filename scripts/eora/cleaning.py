"""What can be deleted: results that the config no longer names, kept results that none uses."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eora import manifest, stages, store
from eora.config import Config


@dataclass(frozen=True)
class Waste:
    """Something that can be deleted: its files and folders, what they take, what this frees."""

    name: str
    paths: tuple[Path, ...]
    bytes: int
    freed: int


def orphans(config: Config) -> list[Waste]:
    """Results, with their logs and benchmarks, that the config no longer asks for.

    Only folders that a stage made, or began to make, are among them: other files stay.
    """
    results = Path(config["results"])
    wanted = {place.folder for place in stages.asked(config)}
    found = {}
    for stage in stages.STAGES.values():
        for path in results.glob(re.sub(r"[^/]*\{[^/]*", "*", stage.folder)):
            folder = path.relative_to(results).as_posix()
            place = stages.place_of(folder)
            begun = (path / manifest.NAME).is_file() or any(path.glob(".partial-*"))
            if place is not None and folder not in wanted and begun:
                below = f"{place.stage}/{folder.split('/', 1)[1]}"
                marks = (results / f"logs/{below}.log", results / f"benchmarks/{below}.tsv")
                found[folder] = _waste(folder, (path, *(mark for mark in marks if mark.is_file())))
    return [found[folder] for folder in sorted(found)]


def unused(kept: Path) -> list[Waste]:
    """Entries of the store that no result uses any more, and what killed jobs left in it."""
    return [
        Waste(str(entry.path.relative_to(kept)), (entry.path,), entry.bytes, entry.freed)
        for entry in store.entries(kept)
        if not entry.stage or entry.freed == entry.bytes
    ]


def _waste(name: str, paths: tuple[Path, ...]) -> Waste:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    stats = [file.stat() for file in files if file.is_file()]
    total = sum(stat.st_size for stat in stats)
    return Waste(name, paths, total, sum(stat.st_size for stat in stats if stat.st_nlink == 1))


def delete(wastes: Iterable[Waste], results: Path) -> None:
    """Delete them, and the folders below ``results`` that this empties."""
    for waste in wastes:
        for path in waste.paths:
            if path.is_dir():
                # The manifest goes first: what is half deleted does not look whole.
                (path / manifest.NAME).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink()
            for folder in path.parents:
                if folder == results or not folder.is_relative_to(results):
                    break
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
