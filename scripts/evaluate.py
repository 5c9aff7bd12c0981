"""Judge one model (original, compressed, or compressed with an adapter) by one task."""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eora import cli, manifest
from eora.result import Result


@dataclass
class Params:
    """Keys: kind (lm_eval or perplexity); version.
    For lm_eval: name, num_fewshot (null: the task's own), limit (null: all), chat_template.
    For perplexity: column that holds the text, window (tokens), windows (how many, or all), join
    (what stands between rows that are one text; null: each is one)."""

    kind: str
    version: int
    name: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    column: str | None = None
    window: int | None = None
    windows: int | str | None = None
    join: str | None = None
    trust_remote_code: bool = False


def main(
    params: Annotated[str, cli.Params],
    model: Annotated[Path, cli.Stage("the download or the compress stage")],
    out: Annotated[Path, cli.Out],
    adapter: Annotated[Path | None, cli.Stage("an adapter, 16-bit or packed")] = None,
    task: Annotated[Path | None, cli.Stage("the prepare_task stage")] = None,
    dataset: Annotated[Path | None, cli.Stage("a data set's download")] = None,
    fewshot: Annotated[Path | None, cli.Stage("a data set for few-shot examples")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = 8,
    planned_mb: Annotated[
        int, typer.Option(help="Memory that was predicted, to be told beside what it takes; or 0.")
    ] = 0,
    device: Annotated[str, cli.Device] = "auto",
    store: Annotated[Path | None, cli.Store] = None,
) -> None:
    if task is not None:
        cli.task_cache(task)
    cli.setup()
    spec = cli.parse(params, Params)
    # Seconds and memory differ from run to run: results.json holds them, the manifest does not.
    result = Result(
        out,
        stage="evaluate",
        params=vars(spec),
        inputs={
            "model": model,
            # Whatever rank its curve of errors goes to.
            "adapter": None if adapter is None else adapter / "adapter",
            "task": task,
            "dataset": dataset,
            "fewshot": fewshot,
        },
        tools=("lm_eval", "torch", "transformers"),
        volatile=("results.json",),
        kept=store,
    )
    if result.restored():
        return
    where = cli.device(device)
    from eora import evaluation, loading, memory, nltk_data, tasks, text

    notes: dict = {}
    with result.publish(notes) as folder:
        started = time.monotonic()
        network, tokenizer = loading.load(
            model / "model",
            None if adapter is None else adapter / "adapter",
            where,
            spec.trust_remote_code,
        )
        needed = {"loading": memory.peak(where)}
        memory.reset_peak(where)
        prompt_tokens = evaluation.prompt(network)
        needed["prompt"] = memory.peak(where)
        if spec.kind == "perplexity":
            ids = text.perplexity_windows(
                text.texts(dataset / "data", spec.column, empty=spec.join is not None),
                tokenizer,
                None if spec.windows == "all" else spec.windows,
                spec.window,
                spec.join,
            )
            judged = evaluation.perplexity(network, ids, batch_size)
        else:
            told = json.loads((task / "task.json").read_text())
            data = None if dataset is None else dataset / "data"
            examples = None if fewshot is None else fewshot / "data"
            with (
                nltk_data.kept(cli.nltk_folder(task), network=False)
                if "nltk" in told
                else nullcontext()
            ):
                loaded = tasks.load(spec.name, told["folder"], data, examples)
            judged = evaluation.harness(
                network,
                tokenizer,
                loaded,
                spec.name,
                num_fewshot=spec.num_fewshot,
                limit=spec.limit,
                chat_template=spec.chat_template,
                batch_size=batch_size,
            )
        notes |= {
            "metrics": judged.metrics,
            "primary": evaluation.primary(judged.metrics),
            "samples": judged.samples,
        }
        measured = notes | {
            "available": judged.available,
            "seconds": round(time.monotonic() - started, 1),
            "memory_bytes": needed,
            "prompt_tokens": prompt_tokens,
            "peak_memory_bytes": max(*needed.values(), memory.peak(where)),
            "planned_memory_bytes": planned_mb * 10**6 or None,
            "device": where,
            "dtype": str(network.dtype).removeprefix("torch."),
            "versions": manifest.versions(("lm_eval", "torch", "transformers", "auto-round")),
        }
        (folder / "results.json").write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
        (folder / "samples.json").write_text(json.dumps(judged.each, sort_keys=True) + "\n")


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
