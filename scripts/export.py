"""Take an adapter out of the results: a folder for a hub, with a model card that is written from
the manifests and results; or, with --merged, the compensated model as a plain dense checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from eora import cli
from eora.errors import Mistake
from eora.result import open_to_others


def main(
    adapter: Annotated[
        Path,
        typer.Argument(
            parser=cli.finished_folder,
            help="An adapter's folder: results/adapters/<model>/<compression>/<adapter>/r64-16bit.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not be there yet.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the dequantized weights with it added.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's folder carries.")
    ] = False,
) -> None:
    cli.setup()
    if out.exists():
        raise Mistake(f"{out} is there already: remove it, or name another --out")
    from eora import export

    source = export.Source.of(adapter)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        if merged:
            export.merge(source, partial, trust_remote_code)
        else:
            export.export(source, partial)
        open_to_others(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    typer.echo(f"{'model' if merged else 'adapter'}: {out.resolve()}", err=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
