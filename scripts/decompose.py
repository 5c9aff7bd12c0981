"""Decompose the compression error of one shard's layers, once for all ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: method (eora, diagonal or svd); max_rank (larger ranks need another decomposition);
    shard and shards; calibrate_on (compressed where the second moments are of that model's inputs,
    else the original's); version."""

    method: str
    max_rank: int
    shard: int
    shards: int
    version: int
    calibrate_on: str | None = None
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the model's download stage")],
    compressed: Annotated[Path, cli.Stage("the compress stage")],
    moments: Annotated[Path, cli.Stage("the covariance stage's shard")],
    out: Annotated[Path, cli.Out],
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    cli.setup()
    spec = cli.parse(params, Params)
    result = Result(
        out,
        stage="decompose",
        params=vars(spec),
        inputs={"model": model, "compressed": compressed, "moments": moments},
        tools=("torch", "transformers", "auto-round", "compressed-tensors"),
        kept=store,
    )
    if result.restored():
        return
    where = cli.device(device)
    from tqdm import tqdm

    from eora import decomposition, shapes, smoothing, streaming

    with result.publish() as folder:
        original = streaming.BlockStream(
            model / "model", where, trust_remote_code=spec.trust_remote_code
        )
        approximate = streaming.BlockStream(
            compressed / "model", where, trust_remote_code=spec.trust_remote_code
        )
        scales = smoothing.Smoothing(compressed)
        factors = folder / "factors"
        factors.mkdir()
        blocks = shapes.shard_range(spec.shard, spec.shards, len(original))
        for index in tqdm(blocks, desc="blocks", unit="block"):
            decomposition.decompose_block(
                original,
                approximate,
                index,
                moments / "moments",
                factors,
                spec.max_rank,
                spec.method,
                scales,
                compressed_inputs=spec.calibrate_on == "compressed",
            )


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
