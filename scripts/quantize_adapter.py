"""Round one rank's adapter to a few bits, so that its product stays what it was, and pack it."""

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
        # Not the curve of errors, which goes to whatever rank was decomposed.
        inputs={"adapter": adapter / "adapter", "moments": adapter / "moments.safetensors"},
        tools=("compressed-tensors", "torch"),
        kept=store,
    )
    if result.restored():
        return
    import torch
    from tqdm import tqdm

    # Row after row, a thousandth of a second each: handing them to threads takes longer than that.
    torch.set_num_threads(1)
    from eora import adapters, factor_files, packing, rounding

    with result.publish() as folder:
        moments = factor_files.InputMoments(adapter / "moments.safetensors")
        pairs = adapters.load_peft(adapter / "adapter")
        rounded = (
            (layer, *rounding.refit(a, b, *moments.of(layer), spec.bits, spec.group_size))
            for layer, (a, b) in tqdm(pairs.items(), desc="layers", unit="layer")
        )
        packing.save(
            folder / "adapter",
            rounded,
            spec.bits,
            spec.group_size,
            spec.base_model,
            adapters.is_transposed(adapter / "adapter"),
        )


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
