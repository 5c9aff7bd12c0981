"""Refuse ranks above the width of one of a model's layers, before work is spent on it."""

import json
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
    config.check_ranks(manifest.load(model), name, json.loads(ranks))


if __name__ == "__main__":
    cli.run(main, __doc__)
