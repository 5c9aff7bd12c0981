"""Show what of a config is done, missing or stale, because of which key, and what is left over.

The states: done; missing (never made, or lost); stale (something that it depends on was changed:
the key is named, old -> new value); follows (only made again because a job before it runs; where
that comes out the same it is restored, not computed). The next run makes all but the done."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from eora import cleaning, cli, commands, status, store

COLOURS = {
    "done": "green",
    "missing": "cyan",
    "stale": "red",
    "follows": "yellow",
    "differs": "red",
}
FOLD = 60  # rows that a table may have before those that are done go


def cell(states: Counter[str]) -> str:
    total = sum(states.values())
    parts = [
        f"[{colour}]{state if total == 1 else f'{states[state]} {state}'}[/]"
        for state, colour in COLOURS.items()
        if states[state]
    ]
    return ", ".join(parts)


def main(
    config: Annotated[Path, typer.Option(help="The config to look at.")] = Path("config.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Every job, as JSON lines.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those rows of a long table that are done.")
    ] = False,
) -> None:
    cli.setup()
    wanted = commands.load_config(config)
    found = status.jobs(wanted, commands.summary(config))
    if as_json:
        for job in found:
            typer.echo(json.dumps({k: v for k, v in asdict(job).items() if k != "place"}))
        return
    console = Console(soft_wrap=False, width=None if Console().is_terminal else 140)
    show_table(console, status.table(wanted, found), everything)
    show_reasons(console, found)
    show_left_over(console, wanted)


def show_table(console: Console, rows: dict, everything: bool) -> None:
    shown = Table("model", "compression", "adapter", *status.COLUMNS)
    hidden = 0
    for row, cells in rows.items():
        if len(rows) > FOLD and not everything and set().union(*cells.values()) == {"done"}:
            hidden += 1
            continue
        shown.add_row(*row, *(cell(cells.get(column, Counter())) for column in status.COLUMNS))
    console.print(shown)
    if hidden:
        console.print(f"{hidden} rows that are done are not shown; --all shows them.")


def show_reasons(console: Console, found: list[status.Job]) -> None:
    causes = defaultdict(list)
    for job in found:
        for why in job.why:
            causes[job.state, why].append(job)
    for (state, why), jobs in sorted(causes.items()):
        console.print(f"[{COLOURS[state]}]{state}[/] {why}", highlight=False)
        names = [f"{job.rule} {job.folder}".removesuffix(" .") for job in jobs]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"      {', '.join(names[:3])}{more}", highlight=False)
    if any(job.state == "differs" for job in found):
        console.print(
            "What differs was made with other parameters, and Snakemake does not know: its notes, "
            "in .snakemake beside the results, are missing. To make it again: snakemake --forcerun"
            " with the first stage named above."
        )
    states = Counter(job.state for job in found if job.runs)
    if states:
        told = ", ".join(f"{count} {state}" for state, count in states.most_common())
        console.print(f"The next run starts {states.total()} of {len(found)} jobs: {told}.")
    else:
        console.print(f"Nothing to be done: all {len(found)} jobs are up to date.")


def show_left_over(console: Console, wanted: dict) -> None:
    kept = Path(wanted["results"], store.NAME)
    left = cleaning.orphans(wanted)
    if left:
        total = sum(waste.bytes for waste in left)
        console.print(
            f"No longer named in the config: {len(left)} results, {commands.size(total)}"
            " (make clean-orphans lists them)."
        )
    entries = list(store.entries(kept))
    if entries:
        unused = sum(entry.freed for entry in entries)
        console.print(
            f"Kept for restoring in {kept}: {len(entries)} results,"
            f" {commands.size(sum(entry.bytes for entry in entries))}, of which"
            f" {commands.size(unused)} are in no present result (make prune lists them)."
        )


if __name__ == "__main__":
    cli.run(main, __doc__)
