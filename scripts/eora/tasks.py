"""lm-eval's tasks: where they are defined, their data or ours in their place. Without torch."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import DatasetDict, load_from_disk
from jinja2 import TemplateError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from eora.errors import Mistake

ROOT = Path(lm_eval.tasks.__file__).parent


def locate(name: str) -> str:
    """The folder of lm-eval's own tasks that defines ``name``, relative to ``lm_eval/tasks``.

    Indexing all of lm-eval's tasks takes seconds: only folders that mention the name are, and
    evaluations of a single task index its folder alone. A group may have members anywhere: its
    folder is the root.
    The task's code is imported, as some of it fetches what it needs on import.

    Raises:
        Mistake: lm-eval knows no such task or group; the message names those like it.
    """
    mentioned = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)").search
    files = (file for file in ROOT.rglob("*.yaml") if mentioned(file.read_text(errors="ignore")))
    folders = {str(ROOT / file.relative_to(ROOT).parts[0]) for file in files}
    manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    entry = manager.task_index.get(name)
    if entry is not None and entry.kind is Kind.TAG:
        raise Mistake(f"tasks.<name>.lm_eval: {name!r} is a tag; give its tasks an entry each")
    if entry is None or entry.yaml_path is None:
        near = difflib.get_close_matches(name, TaskManager().all_tasks, n=3)
        raise Mistake(
            f"tasks.<name>.lm_eval: lm-eval has no task {name!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + "`lm-eval ls tasks` lists those that it has"
        )
    load_yaml(entry.yaml_path, resolve_func=True)
    return "." if entry.kind is Kind.GROUP else entry.yaml_path.relative_to(ROOT).parts[0]


def load(
    name: str, folder: str, data: Path | None = None, fewshot: Path | None = None
) -> dict[str, Any]:
    """lm-eval's task objects for ``name``, with its own data or with ours.

    Args:
        name: an lm-eval task or group.
        folder: see :func:`locate`.
        data: a saved data set that replaces the task's own; its columns must be the same.
        fewshot: a saved data set to draw few-shot examples from; only with ``data``.

    Raises:
        Mistake: the task cannot use our data.
    """
    manager = TaskManager(include_path=str(ROOT / folder), include_defaults=False)
    if data is None:
        return manager.load([name])

    def splits(**_: Any) -> DatasetDict:
        found = {"test": load_from_disk(str(data))}
        if fewshot is not None:
            found["train"] = load_from_disk(str(fewshot))
        return DatasetDict(found)

    train = "train" if fewshot is not None else None
    entry = manager.task_index[name]
    if entry.yaml_path is None or entry.kind is not Kind.TASK:
        raise Mistake(
            f"tasks.<name>.dataset: fits single lm-eval tasks, and {name} is a group; remove it, "
            "or name one of the group's tasks"
        )
    override = {
        "custom_dataset": splits,
        "test_split": "test",
        "validation_split": None,
        "training_split": train,
        "fewshot_split": train,
        # Else the task's own number of examples would come from the questions themselves.
        **({} if fewshot is not None else {"num_fewshot": 0}),
    }
    definition = load_yaml(entry.yaml_path, resolve_func=True) | override
    with _usable(name, "dataset", data):
        loaded = manager.load([definition])
        task = loaded["tasks"][name]
        _read(task, task.eval_docs)
    if fewshot is not None:
        with _usable(name, "fewshot_dataset", fewshot):
            _read(task, task.fewshot_docs())
    return loaded


def _read(task: Any, rows: Iterable[Any]) -> None:
    """Have the task read every row, as it will when the model is judged."""
    for row in rows:
        task.doc_to_text(row)
        task.doc_to_target(row)


@contextmanager
def _usable(name: str, key: str, data: Path) -> Iterator[None]:
    """Tell a task's failure to read our data in the user's words."""
    try:
        yield
    except (LookupError, TypeError, ValueError, TemplateError) as error:
        columns = ", ".join(load_from_disk(str(data)).column_names)
        raise Mistake(
            f"tasks.<name>.{key}: lm-eval's {name} cannot use these data, as it finds {error!r}; "
            f"give them the columns of the task's own data (they have {columns})"
        ) from error


def content(rows: Iterable[Any]) -> str:
    """Digest of a data set's rows, so that a change upstream is seen when they are fetched anew."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()
