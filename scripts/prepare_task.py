"""Find an lm-eval task's definition and, where it has data of its own, download them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from eora import cli
from eora.result import Result


@dataclass
class Params:
    """Keys: lm_eval (name of the task or group); download (false where the config gives the data);
    version."""

    lm_eval: str
    download: bool
    version: int


def main(params: Annotated[str, cli.Params], out: Annotated[Path, cli.Out]) -> None:
    spec = cli.parse(params, Params)
    cli.task_cache(out)
    cli.setup(network=True)
    from eora import nltk_data, tasks

    result = Result(out, stage="prepare_task", params=vars(spec), tools=("lm_eval", "datasets"))
    with result.publish() as folder:
        # Imports its code, which may fetch things.
        with nltk_data.kept(cli.nltk_folder(out), network=True) as asked:
            where = tasks.locate(spec.lm_eval)
        task = {"lm_eval": spec.lm_eval, "folder": where, "data": {}}
        task |= {"nltk": sorted(set(asked))} if asked else {}
        if spec.download:
            loaded = tasks.load(spec.lm_eval, where)
            task["data"] = {
                name: {split: tasks.content(rows) for split, rows in leaf.dataset.items()}
                for name, leaf in loaded["tasks"].items()
            }
        (folder / "task.json").write_text(json.dumps(task, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    cli.run(main, __doc__, Params)
