"""Cut a data set into a model's calibration samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: column that holds the text; samples; seqlen (tokens a sample); layout (packed:
    documents joined and cut into full windows; documents: one a sample, padded); version.
    In place of column, for several data sets: mix, of each by its name, in the order of --dataset,
    column and samples."""

    samples: int
    seqlen: int
    layout: str
    version: int
    column: str | None = None
    mix: dict | None = None
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    dataset: Annotated[list[Path], cli.Stage("a data set's download stage")],
    out: Annotated[Path, cli.Out],
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    one_part = {"": {"column": spec.column, "samples": spec.samples}}
    parts = [(part["column"], part["samples"]) for part in (spec.mix or one_part).values()]
    if len(dataset) != len(parts):
        raise typer.BadParameter("give as many --dataset as mix has entries")
    one = len(dataset) == 1
    result = Result(
        out,
        stage="tokenize",
        params=vars(spec),
        inputs={"model": model}
        | {"dataset" if one else f"dataset-{i}": path for i, path in enumerate(dataset)},
        tools=("transformers", "tokenizers"),
        kept=store,
    )
    if result.restored():
        return
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from eora import text

    with result.publish() as folder:
        tokenizer = AutoTokenizer.from_pretrained(
            model / "model", trust_remote_code=spec.trust_remote_code
        )
        documents = (
            (text.texts(path / "data", column), count)
            for path, (column, count) in zip(dataset, parts, strict=True)
        )
        input_ids, lengths = text.mixture(documents, tokenizer, spec.seqlen, spec.layout)
        save_file({"input_ids": input_ids, "lengths": lengths}, folder / "tokens.safetensors")


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
