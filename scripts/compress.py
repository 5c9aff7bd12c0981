"""Quantize a model with AutoRound."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: bits, group_size, sym, iters, batch_size, seed (as AutoRound means them); format
    (auto_round or auto_gptq); alg_ext; keep (parts of names of layers left in 16 bits); version.
    The number of samples and their length are those of --tokens."""

    bits: int
    group_size: int
    sym: bool
    iters: int
    batch_size: int
    format: str
    alg_ext: bool
    seed: int
    version: int
    keep: list = field(default_factory=list)
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    tokens: Annotated[Path, cli.Stage("the tokenize stage (packed)")],
    out: Annotated[Path, cli.Out],
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    result = Result(
        out,
        stage="compress",
        params=vars(spec),
        inputs={"model": model, "tokens": tokens},
        tools=("auto-round", "torch", "transformers"),
        kept=store,
    )
    if result.restored():
        return
    where = cli.device(device)
    from safetensors.torch import load_file

    from eora import autoround

    with result.publish() as folder:
        data = load_file(tokens / "tokens.safetensors")
        settings = {key: value for key, value in vars(spec).items() if key != "version"}
        autoround.quantize(
            model / "model",
            folder / "model",
            data["input_ids"],
            device=where,
            **settings,
        )


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
