"""List the kept results that no present result uses, with their bytes; delete them with --yes.

They are what earlier configs made: going back to one of those then computes it anew."""

from pathlib import Path
from typing import Annotated

import typer

from eora import cleaning, cli, commands, store


def main(
    config: Annotated[Path, typer.Option(help="The config whose results folder it is.")] = Path(
        "config.yaml"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Delete them.")] = False,
) -> None:
    cli.setup()
    kept = Path(commands.load_config(config)["results"], store.NAME)
    commands.offer(cleaning.unused(kept), kept, yes, "kept results that none uses")


if __name__ == "__main__":
    cli.run(main, __doc__)
