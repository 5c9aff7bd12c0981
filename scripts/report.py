"""Write summary.csv, summary.json and report.html from all results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli


@dataclass
class Params:
    """Keys: variants (what was judged: model, variant, compression, adapter, rank, adapter_bits);
    tasks; metrics (task -> the one to show, null: the usual); compressions, adapters, calibrations
    (their settings); version."""

    variants: list
    tasks: list
    metrics: dict
    compressions: dict
    adapters: dict
    calibrations: dict
    version: int


def main(
    params: Annotated[str, cli.Params],
    results: Annotated[Path, typer.Argument(help="The results folder; the report lands in it.")],
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    from eora import report

    frame = report.build(results, vars(spec))
    report.write(frame, vars(spec), results)
    typer.echo(f"report: {(results / 'report.html').resolve()}", err=True)


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
