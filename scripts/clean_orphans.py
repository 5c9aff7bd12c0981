"""List the results that the config no longer names, with their bytes; delete them with --yes."""

from pathlib import Path
from typing import Annotated

import typer

from eora import cleaning, cli, commands


def main(
    config: Annotated[Path, typer.Option(help="The config that names what stays.")] = Path(
        "config.yaml"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Delete them.")] = False,
) -> None:
    cli.setup()
    wanted = commands.load_config(config)
    results = Path(wanted["results"])
    what = "results that the config no longer names"
    commands.offer(cleaning.orphans(wanted), results, yes, what)


if __name__ == "__main__":
    cli.run(main, __doc__)
