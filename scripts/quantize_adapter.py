"""Round one rank's adapter to a few bits and pack it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: bits; group_size (values that share a scale); base_model; version."""

    bits: int
    group_size: int
    base_model: str
    version: int


def main(
    params: Annotated[str, cli.Params],
    adapter: Annotated[Path, cli.Stage("the adapter stage (16-bit)")],
    out: Annotated[Path, cli.Out],
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    result = Result(
        out,
        stage="quantize_adapter",
        params=vars(spec),
        inputs={"adapter": adapter / "adapter"},  # whatever rank its curve of errors goes to
        tools=("compressed-tensors", "torch"),
        kept=store,
    )
    if result.restored():
        return
    from eora import adapters, packing

    with result.publish() as folder:
        packing.save(
            folder / "adapter",
            adapters.load_peft(adapter / "adapter"),
            spec.bits,
            spec.group_size,
            spec.base_model,
            adapters.is_transposed(adapter / "adapter"),
        )


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
