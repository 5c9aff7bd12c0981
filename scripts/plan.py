"""What a config will cost, told before it runs: memory, disk, work and hours of every stage.

Reads the config and, of each model, the shapes of its layers: from its download or its folder, else
from config.json alone, which is fetched from the hub. Weights are not read and nothing is computed.

Memory is what one job of a row needs at its peak: on the GPU and beside it ("host"), or without a
GPU ("CPU"). Disk, work and hours are those of all its jobs, one after the other. Cards that a row
does not fit have an exclamation mark; below the table it says which setting mends that."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from eora import cli, commands, plan, shapes, sources, store
from eora.config import Config, pick
from eora.errors import Mistake

ASSUMED = (
    "Counted with full samples, a disk of 1 GB/s and the efficiencies in scripts/eora/plan.py;"
    f" an lm-eval task without limit as {plan.QUESTIONS:,} questions of {plan.QUESTION_TOKENS:,}"
    " tokens. Tasks that write text take longer. What is done already is counted all the same."
)


def read_shapes(entry: Config, made: Path) -> shapes.Shapes | None:
    """A model's shapes, from wherever they can be had; None where it must be downloaded first."""
    folder = Path(entry.get("path", "")).expanduser()
    bare = "path" in entry and folder.is_dir() and not any(folder.glob("*.safetensors"))
    if not bare and (found := shapes.known(entry, made)) is not None:
        return found
    if "hub" in entry and not entry["trust_remote_code"]:
        with tempfile.TemporaryDirectory() as scratch:
            sources.fetch_config(pick(entry, ("hub", "revision")), Path(scratch))
            return shapes.declared(Path(scratch))
    if bare and (folder / "config.json").is_file():
        return shapes.declared(folder, entry["trust_remote_code"])
    return None


def card_names(given: list[str] | None, device: str) -> list[str]:
    """The cards to tell of: those named, else all that the config's device can be.

    Raises:
        Mistake: a card that is not known.
    """
    known = [*plan.CARDS, "cpu"]
    if unknown := set(given or ()) - set(known):
        raise Mistake(f"--card: {', '.join(unknown)} is not known; take one of {', '.join(known)}")
    return given or (["cpu"] if device == "cpu" else known)


def main(
    config: Annotated[Path, typer.Option(help="The config to plan.")] = Path("config.yaml"),
    card: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(plan.CARDS)} or cpu; may be given again. Without it, all."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="A JSON object a row, with all terms of memory, in bytes."),
    ] = False,
) -> None:
    cli.setup(network=True)
    wanted = commands.load_config(config)
    results, runtime = Path(wanted["results"]), wanted["runtime"]
    names = card_names(card, runtime["device"])
    cores = runtime["threads"] or min(8, os.cpu_count())
    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    disk = 0.0
    for model, entry in wanted["models"].items():
        found = read_shapes(entry, results / "models" / model)
        if found is None:
            made = results / "models" / model / "manifest.json"
            console.print(f"{model} is not here to be read: run   snakemake --cores 1 -- {made}\n")
            continue
        planned = plan.plan(wanted, model, found, names, cores)
        disk += sum(row.disk for row in planned)
        if as_json:
            for row in planned:
                typer.echo(json.dumps({"model": model, **asdict(row)}))
        else:
            show(console, model, found, planned)
    if as_json:
        return
    told = commands.size(int(disk))
    place = next(p for p in (results, *results.absolute().parents) if p.exists())
    room = shutil.disk_usage(place).free + used(results)
    console.print(
        f"Disk for all: {told} in {results}, where there is room for {commands.size(room)}."
    )
    if disk > room:
        console.print("[red]Too little:[/] set results to a folder on a larger disk.")
    console.print(ASSUMED, style="dim")


def used(results: Path) -> int:
    """Bytes of the results that are there; the store holds second names of the same files."""
    return sum(
        (Path(folder) / name).lstat().st_size
        for folder, _, files in os.walk(results)
        if store.NAME not in Path(folder).parts
        for name in files
    )


def show(console: Console, model: str, found: shapes.Shapes, planned: list[plan.Row]) -> None:
    hours = [estimate.card for estimate in planned[0].cards]
    gpu = any(row.gpu for row in planned)
    cpu = any(row.cpu for row in planned)
    table = Table(
        title=f"{model}: {found.parameters / 1e9:,.2f} billion parameters in {len(found.blocks)} "
        f"blocks, hidden size {found.hidden:,}, {found.stored / plan.GB:,.1f} GB",
        title_justify="left",
        show_footer=True,
    )
    table.add_column("stage", "all jobs", no_wrap=True)
    table.add_column("jobs", f"{sum(row.jobs for row in planned):,}", justify="right")
    for title in ["GPU GB", "host GB"] * gpu + ["CPU GB"] * cpu:
        table.add_column(title, justify="right")
    for title, value in (
        ("disk GB", sum(row.disk for row in planned) / plan.GB),
        ("PFLOP", sum(row.operations for row in planned) / 1e15),
    ):
        table.add_column(title, number(value), justify="right")
    for i, name in enumerate(hours):
        summed = sum(row.cards[i].hours for row in planned)
        table.add_column(f"h {name}", number(summed), justify="right")
    for row in planned:
        memory = [row.gpu, row.host] * gpu + [row.cpu] * cpu
        table.add_row(
            row.label,
            f"{row.jobs:,}",
            *(number(plan.total(phase) / plan.GB) if phase else "-" for phase in memory),
            number(row.disk / plan.GB),
            number(row.operations / 1e15),
            *(number(e.hours) if e.fits else f"[red]! {number(e.hours)}[/]" for e in row.cards),
        )
    console.print(table)
    for row in planned:
        for line in plan.warnings(row):
            console.print(f"[red]![/] {line}")
    console.print()


def number(value: float) -> str:
    """Three digits, or 0 for what is small."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


if __name__ == "__main__":
    cli.run(main, __doc__)
