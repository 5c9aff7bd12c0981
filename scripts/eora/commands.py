"""What the commands share that look at a whole config, such as plan, status and recommend.

They are the workflow's, not the library's: this module alone knows the Snakefile and the schema.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
import yaml
from tqdm import tqdm

from eora import cleaning, config
from eora.cleaning import Waste
from eora.errors import Mistake

ROOT = Path(__file__).parents[2]
LOCKS = Path(".snakemake/locks")


def load_config(path: Path) -> config.Config:
    """The checked config, defaults filled in.

    Raises:
        ConfigError: it does not fit, or it is no file.
    """
    config.check_file(path)
    schema = config.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    return config.validate(yaml.safe_load(path.read_text()), schema)


def summary(config_file: Path) -> Iterator[dict[str, str]]:
    """Snakemake's detailed summary: a row for each output of the config's graph.

    Raises:
        Mistake: it cannot build the graph; with its message.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", str(config_file), "--cores", "1", "--nolock", "--detailed-summary"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Mistake(f"snakemake could not build the graph:\n{done.stderr.strip()}")
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("output_file\t"))
    yield from csv.DictReader(lines[start:], delimiter="\t", quoting=csv.QUOTE_NONE)


def size(number: int) -> str:
    """Bytes in words, such as 1.23GB."""
    return tqdm.format_sizeof(number, "B", 1000)


def offer(wastes: list[Waste], below: Path, yes: bool, what: str) -> None:
    """Print what can be deleted, with bytes; delete it where the user said yes.

    Raises:
        Mistake: a run is going on in the working directory.
    """
    for waste in wastes:
        held = "" if waste.freed else " (also in the store)"
        typer.echo(f"{size(waste.bytes):>8}  {below / waste.name}{held}")
    total, freed = sum(w.bytes for w in wastes), sum(w.freed for w in wastes)
    typer.echo(f"{len(wastes)} {what}: {size(total)}; deleting them frees {size(freed)}.")
    if freed < total:
        typer.echo("The rest stays in the store, to be restored from; make prune frees it.")
    if wastes and not yes:
        typer.echo("Nothing was deleted: add --yes (make: ARGS=--yes) to delete them.")
    elif wastes:
        if LOCKS.is_dir() and any(LOCKS.iterdir()):
            raise Mistake(
                f"a run holds {LOCKS}: wait for its end (after a crash: snakemake --unlock)"
            )
        cleaning.delete(wastes, below)
        typer.echo("Deleted.")
