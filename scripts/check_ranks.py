"""Refuse ranks above the width of one of a model's layers, before work is spent on it."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from eora import cli, config, manifest


def main(
    name: Annotated[str, typer.Option(help="The model's name in the config.")],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    ranks: Annotated[str, typer.Option(help="JSON object: adapter -> list of ranks.")],
) -> None:
    cli.setup()
    try:
        config.check_ranks(manifest.load(model), name, json.loads(ranks))
    except config.ConfigError as error:
        logging.error("The config does not fit. Please mend:\n%s", error)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    cli.run(main, __doc__)
