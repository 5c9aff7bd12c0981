"""What can be deleted: results that the config no longer names, kept results that none uses."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from eora import manifest, stages, store
from eora.config import Config, ConfigError

LOCKS = Path(".snakemake/locks")


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


def check_idle(locks: Path = LOCKS) -> None:
    """Refuse to delete beside a run in this folder.

    Raises:
        ConfigError: Snakemake holds its lock.
    """
    if locks.is_dir() and any(locks.iterdir()):
        raise ConfigError(
            f"a run holds {locks}: wait for its end (after a crash: snakemake --unlock)"
        )


def size(number: int) -> str:
    """Bytes in words, such as 1.23GB."""
    return tqdm.format_sizeof(number, "B", 1000)


def offer(wastes: list[Waste], below: Path, yes: bool, what: str) -> None:
    """Print what can be deleted, with bytes; delete it where the user said yes.

    Raises:
        ConfigError: a run is going on.
    """
    for waste in wastes:
        held = "" if waste.freed else " (also in the store)"
        print(f"{size(waste.bytes):>8}  {below / waste.name}{held}")
    total, freed = sum(w.bytes for w in wastes), sum(w.freed for w in wastes)
    print(f"{len(wastes)} {what}: {size(total)}; deleting them frees {size(freed)}.")
    if freed < total:
        print("The rest stays in the store, from where it can be restored; make prune frees it.")
    if wastes and not yes:
        print("Nothing was deleted: add --yes (make: ARGS=--yes) to delete them.")
    elif wastes:
        check_idle()
        delete(wastes, below)
        print("Deleted.")


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
