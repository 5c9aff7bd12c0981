"""Cut a data set into a model's calibration samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: column that holds the text; samples; seqlen (tokens a sample); layout (packed:
    documents joined and cut into full windows; documents: one a sample, padded); version."""

    column: str
    samples: int
    seqlen: int
    layout: str
    version: int
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    dataset: Annotated[Path, cli.Stage("the data set's download stage")],
    out: Annotated[Path, cli.Out],
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    result = Result(
        out,
        stage="tokenize",
        params=vars(spec),
        inputs={"model": model, "dataset": dataset},
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
        documents = text.texts(dataset / "data", spec.column)
        input_ids, lengths = text.windows(
            documents, tokenizer, spec.samples, spec.seqlen, spec.layout
        )
        save_file({"input_ids": input_ids, "lengths": lengths}, folder / "tokens.safetensors")


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
