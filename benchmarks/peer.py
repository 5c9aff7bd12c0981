"""Our adapters of several ranks against GPTQModel's adapter.generate, once a rank."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

import common
from common import ADAPTER, CALIBRATION, COMPRESSION, MODEL, PLACE, TASK, Cost, Target
from eora import manifest

HERE = Path(__file__).parent
SHARD = {"shard": 0, "shards": 1}


def ours(
    config: dict[str, Any], out: Path, batch_size: int
) -> tuple[dict[str, Cost], dict[int, Path]]:
    """Second moments, decomposition and each rank's adapter, a process each, as the workflow does.

    Returns:
        What each process took, and rank -> the adapter stage's folder.
    """
    shutil.rmtree(out, ignore_errors=True)
    model = ["--model", common.result("download_model", model=MODEL)]
    names = {"model": MODEL, "compression": COMPRESSION, "adapter": ADAPTER}
    tokens = common.result("tokenize", model=MODEL, calibration=CALIBRATION)
    moments, factors = out / "moments", out / "factors"
    costs = {
        "covariance": common.stage(
            config,
            "covariance",
            moments,
            [*model, "--tokens", tokens, "--batch-size", batch_size],
            model=MODEL,
            calibration=CALIBRATION,
            **SHARD,
        )
    }
    compressed = common.result("compress", model=MODEL, compression=COMPRESSION)
    costs["decompose"] = common.stage(
        config,
        "decompose",
        factors,
        [*model, "--compressed", compressed, "--moments", moments],
        **names,
        **SHARD,
    )
    folders = {rank: out / f"r{rank}" for rank in config["adapters"][ADAPTER]["ranks"]}
    for rank, folder in folders.items():
        costs[f"adapter {rank}"] = common.stage(
            config, "adapter", folder, [factors], **names, rank=rank
        )
    return costs, folders


def theirs(python: Path, rank: int, out: Path, batch_size: int) -> tuple[Cost, float]:
    """One adapter by GPTQModel, in a process of its own, laid out as our adapter stage does.

    What it saves is PEFT's format as well (A (r, in) and B (out, r) of each layer under its name),
    so that both sides are judged by the same code.

    Returns:
        What the process took, and the seconds of the call alone, without imports.
    """
    shutil.rmtree(out, ignore_errors=True)
    model = common.result("download_model", model=MODEL) / "model"
    compressed = common.result("compress", model=MODEL, compression=COMPRESSION) / "model"
    tokens = common.result("tokenize", model=MODEL, calibration=CALIBRATION) / "tokens.safetensors"
    cost = common.run(
        [
            *(python, HERE / "generate.py", "--model", model, "--compressed", compressed),
            *("--tokens", tokens, "--rank", rank, "--batch-size", batch_size),
            *("--out", out / "adapter"),
        ],
        PLACE / "logs" / f"gptqmodel-{out.name}.log",
        # Its own choice (half of the cores, at most 12), but never one: its loader asks for two.
        GPTQMODEL_CPU_WORKERS=str(max(2, min(12, (os.cpu_count() + 1) // 2))),
        HF_HUB_OFFLINE="1",
    )
    call = float((out / "adapter" / "seconds.txt").read_text())
    manifest.seal(out, {"stage": "adapter"})
    return cost, call


def perplexity(config: dict[str, Any], name: str, model: Path, adapter: Path | None) -> float:
    """On text that neither side has seen, by the workflow's own evaluation."""
    dataset = common.result("download_dataset", dataset=config["tasks"][TASK]["perplexity"])
    out = PLACE / "perplexity" / name
    arguments = ["--model", model, "--dataset", dataset]
    if adapter is not None:
        arguments += ["--adapter", adapter]
    common.stage(config, "evaluate", out, arguments, model=MODEL, variant=name, task=TASK)
    measured = json.loads((out / "results.json").read_text())
    return measured["metrics"]["perplexity"]["value"]


def main(
    python: Annotated[
        Path, typer.Option(help="Interpreter of an environment with GPTQModel.")
    ] = common.ROOT / ".cache/peer/bin/python",
    with_peer: Annotated[
        bool, typer.Option("--with-peer/--without-peer", help="Run GPTQModel, or ours alone.")
    ] = True,
    samples: common.Samples = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each rank is run.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Samples a batch, ours.")] = 8,
    peer_batch_size: Annotated[
        int, typer.Option(help="Samples a batch, GPTQModel's; 1 is its default.")
    ] = 1,
    json_file: common.Json = None,
) -> None:
    """Make adapters of ranks 32, 64 and 128 for SmolLM2-135M in 2 bits, with ours and GPTQModel.

    Both fit them to the same 2-bit weights and the same 64 x 512 tokens, in processes that are
    timed from start to end, ours and theirs in turns: ours makes all three ranks in a turn
    (covariance, decompose and an adapter process a rank), theirs one. "One rank" of ours is the
    same less the other ranks' adapter processes. Peak memory is that of the largest process.

    Every adapter is then judged by perplexity on the same held-out text.

    About 25 minutes on two cores, nearly all of it GPTQModel; the 2-bit model, made once, takes
    10 more. `make bench` makes GPTQModel's environment; or
    --python names another one's interpreter.
    """
    if with_peer and not python.exists():
        raise typer.BadParameter(
            f"{python} is missing: `make .cache/peer` makes it, --without-peer does without",
            param_hint="--python",
        )
    config = common.prepare(samples)
    ranks = config["adapters"][ADAPTER]["ranks"]
    passes: list[dict[str, Cost]] = []
    calls: dict[int, list[tuple[Cost, float]]] = {rank: [] for rank in ranks}
    for _ in range(repeats):
        for rank in ranks:
            typer.echo(f"ours, ranks {', '.join(map(str, ranks))} ...")
            costs, adapters = ours(config, PLACE / "ours", batch_size)
            passes.append(costs)
            told = ", ".join(f"{name} {cost.wall:.1f} s" for name, cost in costs.items())
            typer.echo(f"  {sum(cost.wall for cost in costs.values()):.1f} s: {told}")
            if not with_peer:
                continue
            typer.echo(f"GPTQModel, rank {rank} ...")
            cost, call = theirs(python, rank, PLACE / "theirs" / f"r{rank}", peer_batch_size)
            calls[rank].append((cost, call))
            typer.echo(f"  {cost.wall:.1f} s, {call:.1f} s of it the call")
    typer.echo("perplexities ...")
    original = common.result("download_model", model=MODEL)
    compressed = common.result("compress", model=MODEL, compression=COMPRESSION)
    judged = {
        "original": perplexity(config, "original", original, None),
        "2 bits": perplexity(config, COMPRESSION, compressed, None),
    }
    for rank in ranks:
        name = f"{COMPRESSION}+{ADAPTER}-r{rank}-16bit"
        judged[f"ours {rank}"] = perplexity(config, name, compressed, adapters[rank])
        if with_peer:
            adapter = PLACE / "theirs" / f"r{rank}"
            judged[f"theirs {rank}"] = perplexity(config, name, compressed, adapter)
    report(ranks, passes, calls if with_peer else {}, judged, json_file)


def report(
    ranks: list[int],
    passes: list[dict[str, Cost]],
    calls: dict[int, list[tuple[Cost, float]]],
    judged: dict[str, float],
    json_file: Path | None,
) -> None:
    """Print medians and ratios, and hold them against the targets."""
    walls = {name: statistics.median(p[name].wall for p in passes) for name in passes[0]}
    shared = walls["covariance"] + walls["decompose"]
    whole = sum(walls.values())
    single = {rank: shared + walls[f"adapter {rank}"] for rank in ranks}
    peaks = {name: max(p[name].peak for p in passes) for name in walls}
    anonymous = {name: max(p[name].anonymous for p in passes) for name in walls}
    memory = max(peaks.values())
    figures: dict[str, Any] = {
        "ours": {
            "seconds": walls,
            "all ranks": whole,
            "peak bytes": peaks,
            "anonymous bytes": anonymous,
        },
        "perplexity": judged,
    }
    typer.echo(f"\n{'':<10} {'ours s':>8} {'theirs s':>9} {'ratio':>6} {'perplexity':>21}")
    targets = []
    if calls:
        medians = {
            rank: statistics.median(cost.wall for cost, _ in some) for rank, some in calls.items()
        }
        alone = {rank: statistics.median(call for _, call in some) for rank, some in calls.items()}
        costs = [cost for some in calls.values() for cost, _ in some]
        their_memory = statistics.median(cost.peak for cost in costs)
        figures["theirs"] = {
            "seconds": medians,
            "seconds of the call alone": alone,
            "peak bytes": [cost.peak for cost in costs],
            "anonymous bytes": [cost.anonymous for cost in costs],
        }
        every = sum(medians.values())
        for rank in ranks:
            typer.echo(
                f"rank {rank:<5} {single[rank]:8.1f} {medians[rank]:9.1f} "
                f"{medians[rank] / single[rank]:6.1f} "
                f"{judged[f'ours {rank}']:10.3f} {judged[f'theirs {rank}']:10.3f}"
            )
        typer.echo(f"{'all':<10} {whole:8.1f} {every:9.1f} {every / whole:6.1f}")
        typer.echo(
            f"{'peak':<10} {common.megabytes(memory):>8} {common.megabytes(their_memory):>9}"
            f"\nWithout its start and imports, GPTQModel takes {sum(alone.values()):.1f} s for all "
            f"(ratio {sum(alone.values()) / whole:.1f}, ours with them)."
        )
        targets = [
            Target("three ranks, times faster than GPTQModel", every / whole, least=10),
            Target(
                "one rank, times faster than GPTQModel (the worst rank)",
                min(medians[rank] / single[rank] for rank in ranks),
                least=3,
            ),
            *(
                Target(
                    f"rank {rank}, perplexity as a part of GPTQModel's",
                    judged[f"ours {rank}"] / judged[f"theirs {rank}"],
                    most=1,
                )
                for rank in ranks
            ),
            Target("SmolLM2, memory as a part of GPTQModel's", memory / their_memory, most=0.5),
        ]
    else:
        for rank in ranks:
            typer.echo(f"rank {rank:<5} {single[rank]:8.1f} {judged[f'ours {rank}']:33.3f}")
        typer.echo(f"{'all':<10} {whole:8.1f}\n{'peak':<10} {common.megabytes(memory):>8}")
    typer.echo(f"Perplexity: {judged['original']:.3f} original, {judged['2 bits']:.3f} in 2 bits.")
    common.conclude(targets, figures, json_file)


if __name__ == "__main__":
    typer.run(main)
