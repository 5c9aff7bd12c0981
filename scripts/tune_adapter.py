"""Fine-tune one rank's adapter beside the frozen compressed model.

A killed job goes on from its last checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: steps; batch_size (samples a step); learning_rate; start (fitted or zero); seed;
    base_model; version. What is trained on is --tokens."""

    steps: int
    batch_size: int
    learning_rate: float
    start: str
    seed: int
    base_model: str
    version: int
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    compressed: Annotated[Path, cli.Stage("the compress stage")],
    adapter: Annotated[Path, cli.Stage("the adapter stage (16-bit)")],
    tokens: Annotated[Path, cli.Stage("the tokenize stage")],
    out: Annotated[Path, cli.Out],
    batch_size: Annotated[int, typer.Option(help="Most samples that run at once.")] = 8,
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    result = Result(
        out,
        stage="tune_adapter",
        params=vars(spec),
        inputs={"compressed": compressed, "adapter": adapter / "adapter", "tokens": tokens},
        tools=("peft", "torch", "transformers"),
        kept=store,
    )
    if result.restored():
        return
    where = cli.device(device, alone=True)  # the Trainer takes every card that it sees
    from safetensors.torch import load_file

    from eora import adapters, tuning

    with result.publish() as folder, result.progress() as checkpoints:
        pairs, losses = tuning.tune(
            compressed / "model",
            adapter / "adapter",
            tuning.Samples(**load_file(tokens / "tokens.safetensors")),
            checkpoints,
            steps=spec.steps,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            start=spec.start,
            seed=spec.seed,
            most=batch_size,
            device=where,
            trust_remote_code=spec.trust_remote_code,
        )
        adapters.save_peft(folder / "adapter", pairs, spec.base_model)
        (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
