"""Refuse a model of an architecture that is not supported, and ranks, groups and names of layers
that do not fit it, before work is spent on it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from eora import cli, config, manifest


def main(
    name: Annotated[str, typer.Option(help="The model's name in the config.")],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    ranks: Annotated[str, typer.Option(help="JSON object: key of the config -> list of ranks.")],
    compressions: Annotated[
        str,
        typer.Option(
            help="JSON object: name of a compression -> group_size (-1: whole rows) and keep (the "
            "layers that it leaves)."
        ),
    ] = "{}",
    plain: Annotated[
        list[str] | None,
        typer.Option(help="Key of the config that wants plain linear layers (several: once each)."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with it.")
    ] = False,
) -> None:
    cli.setup()
    config.check_ranks(manifest.load(model), name, json.loads(ranks))
    from eora import layers, streaming

    stream = streaming.check(model / "model", trust_remote_code)
    for compression, settings in json.loads(compressions).items():
        layers.chosen(stream, **settings, where=f"compressions.{compression}")
    if plain:
        layers.check_plain(stream, *plain)


if __name__ == "__main__":
    cli.run(main, __doc__)
