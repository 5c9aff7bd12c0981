"""All benchmarks that have targets, one after the other: what `make bench` runs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

import common

HERE = Path(__file__).parent
KINDS = {
    "peer": "adapters of three ranks against GPTQModel: time, memory, perplexity",
    "covariance": "the covariance pass against the least it can take",
    "memory": "memory of the pass over a model of 4B weights",
    "solver": "the solver against the textbook form",
}


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run this one alone, of {', '.join(KINDS)}.")
    ] = None,
    with_peer: Annotated[
        bool, typer.Option("--with-peer/--without-peer", help="Measure GPTQModel, or ours alone.")
    ] = True,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny sizes, to see that all works; no figures to go by."),
    ] = False,
    json_file: Annotated[
        Path,
        typer.Option(
            "--json",
            help="Where all figures and targets go.",
            show_default=".cache/bench/bench.json",
        ),
    ] = common.PLACE / "bench.json",
) -> None:
    """Run the benchmarks and end with a line for each target: figure, target, met or not.

    On two cores all of it takes about two hours, half of it the textbook solver at the largest
    shapes. Times mean something on an otherwise idle machine only. Each benchmark
    (benchmarks/<name>.py) also runs alone and says more by --help.

    Exit code 0 also where a target is missed: the lines tell.
    """
    unknown = set(only or ()) - set(KINDS)
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: there are {', '.join(KINDS)}", param_hint="--only"
        )
    extra = {name: [] for name in KINDS}
    if quick:
        extra = {
            "peer": ["--samples", "4"],
            "covariance": ["--samples", "4", "--repeats", "1"],
            "memory": ["--layers", "2", "--samples", "1", "--seqlen", "32"],
            "solver": ["0.03125", "0.0625", "--repeats", "1", "--rank", "16"],
        }
    if not with_peer:
        extra["peer"].append("--without-peer")
    whole: dict = {"machine": machine(), "targets": [], "figures": {}}
    for name in only or KINDS:
        typer.echo(f"\n== {name}: {KINDS[name]}\n")
        part = common.PLACE / f"{name}.json"
        part.unlink(missing_ok=True)
        start = time.monotonic()
        # A process each: what one has in memory must not count for the next.
        command = [sys.executable, HERE / f"{name}.py", *extra[name], "--json", part]
        if subprocess.run(command).returncode:
            raise SystemExit(f"benchmarks/{name}.py failed")
        typer.echo(f"({(time.monotonic() - start) / 60:.0f} min)")
        found = json.loads(part.read_text())
        whole["targets"] += [{"benchmark": name, **target} for target in found["targets"]]
        whole["figures"][name] = found["figures"]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(whole, indent=1) + "\n")
    typer.echo("\n== targets\n")
    for row in whole["targets"]:
        fields = {key: row[key] for key in ("name", "figure", "least", "most", "unit")}
        typer.echo(common.Target(**fields).line())
    typer.echo(f"\nAll figures: {json_file.resolve()}")


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


if __name__ == "__main__":
    typer.run(main)
