"""Slice one rank out of the decompositions and save it in PEFT's LoRA format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: rank; base_model (where the original comes from, for the adapter's config); version."""

    rank: int
    base_model: str
    version: int


def main(
    params: Annotated[str, cli.Params],
    decompositions: Annotated[
        list[Path],
        typer.Argument(
            parser=cli.finished_folder, help="Folders of the decompose stage, one a shard."
        ),
    ],
    out: Annotated[Path, cli.Out],
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    result = Result(
        out,
        stage="adapter",
        params=vars(spec),
        inputs={f"shard {i}": path for i, path in enumerate(decompositions)},
        tools=("torch",),
        kept=store,
    )
    if result.restored():
        return
    from eora import adapters, block_files, factor_files

    with result.publish() as folder:
        files = [file for path in decompositions for file in block_files.listed(path / "factors")]
        pairs, curves = factor_files.slice_rank(files, spec.rank)
        transposed = factor_files.is_transposed(files)
        adapters.save_peft(folder / "adapter", pairs, spec.base_model, transposed)
        factor_files.save_curves(folder / "residuals.json", curves)
        factor_files.save_moments(folder / "moments.safetensors", files, spec.rank)


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
