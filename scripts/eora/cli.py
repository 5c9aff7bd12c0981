"""What all stage scripts share: parameters as one JSON value, device choice, offline mode, logs."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import typer

from eora import cards
from eora.errors import explain
from eora.manifest import NAME

T = TypeVar("T")


def stage_folder(text: str) -> Path:
    """A stage's folder, from its path or from that of the manifest in it."""
    path = Path(text)
    return path.parent if path.name == NAME else path


def finished_folder(text: str) -> Path:
    """A stage's folder, as :func:`stage_folder`, that holds a whole result.

    Raises:
        typer.BadParameter: it has no manifest.
    """
    folder = stage_folder(text)
    if not (folder / NAME).is_file():
        raise typer.BadParameter(f"{folder} holds no finished result ({NAME}): run its stage first")
    return folder


def Stage(help: str) -> Any:  # noqa: N802 - used as an option's type, like typer.Option
    """An option that takes another stage's folder, or the manifest in it."""
    return typer.Option(parser=finished_folder, help=f"Folder (or manifest.json) of {help}.")


Params = typer.Option("--params", help="Parameters as JSON, or @FILE holding it; see above.")
Out = typer.Option(
    "--out", parser=stage_folder, help="Output folder; its manifest.json is written last."
)
Store = typer.Option(
    "--store",
    help="Folder of kept results: an equal one is restored instead of computed; a new one is kept.",
)
Device = typer.Option(
    "--device", help="auto (a free CUDA card when present), cpu, cuda, or cuda:N, that card."
)


_OFFLINE = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_EVALUATE_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)


def setup(*, network: bool = False) -> None:
    """Logs to stderr; keep Hugging Face libraries off the network unless the stage downloads.

    Call it before anything imports transformers, datasets or huggingface_hub: they read these
    variables once.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not network:
        for name in _OFFLINE:
            os.environ[name] = "1"


def task_cache(folder: Path) -> None:
    """Keep what an lm-eval task fetches in its own folder, where offline evaluations find it.

    Like :func:`setup`, before anything imports datasets or nltk.
    """
    cache = (folder / "cache").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    # A login lies in the old home; paths set for the machine would go before the new one.
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    os.environ.setdefault("HF_TOKEN_PATH", str(home / "token"))
    os.environ["HF_HOME"] = str(cache)
    os.environ["HF_HUB_CACHE"] = str(cache / "hub")
    os.environ["HF_DATASETS_CACHE"] = str(cache / "datasets")
    # Where the machine has NLTK's data, they need not be fetched.
    places = [str(nltk_folder(folder)), os.environ.get("NLTK_DATA", "")]
    os.environ["NLTK_DATA"] = os.pathsep.join(filter(None, places))
    nltk_folder(folder).mkdir(exist_ok=True)


def nltk_folder(folder: Path) -> Path:
    """Where a task keeps NLTK's data."""
    return (folder / "cache" / "nltk").resolve()


def parse(text: str, spec: type[T]) -> T:
    """The stage's parameters as its dataclass; a missing or unknown key is named.

    Raises:
        typer.BadParameter: no JSON object, or keys that do not fit ``spec``.
    """
    try:
        values = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--params is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise typer.BadParameter("--params is no JSON object: write {...} with a value a key")
    fields = {f.name: f for f in dataclasses.fields(spec)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    unknown, missing = set(values) - set(fields), required - set(values)
    if unknown or missing:
        problem = [f"unknown: {', '.join(sorted(unknown))}"] if unknown else []
        problem += [f"missing: {', '.join(sorted(missing))}"] if missing else []
        raise typer.BadParameter(f"--params has {'; '.join(problem)} (known: {', '.join(fields)})")
    return spec(**values)


def _hide_others(name: str) -> str:
    """Hide all GPUs but the one that is named; what it is called then."""
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not name.startswith("cuda:"):
        return name
    index = int(name.removeprefix("cuda:"))
    visible = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    if visible and index >= len(visible):
        return name  # :func:`device` refuses it
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return "cuda"


_CLAIMS: list[cards.Claim] = []  # kept until the process ends


def device(name: str, alone: bool = False) -> str:
    """The torch device of a stage, with a card of its own where several jobs share a machine.

    Call it before anything that may initialise CUDA is imported: torch looks once. ``auto`` is CUDA
    where there is some, else the CPU; ``cuda:N`` is that card, whoever else uses it.

    Args:
        name: of the device, as above.
        alone: hide all other GPUs, for libraries that take the first that they see, or all.

    Raises:
        typer.BadParameter: CUDA is asked for where there is none; names the key to change.
    """
    # A card's number is that of nvidia-smi; CUDA would count from the fastest.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    claim = cards.claim() if name in ("auto", "cuda") else None
    if alone:
        name = _hide_others(name)
    import torch

    if torch.cuda.is_available():
        _CLAIMS.extend([claim] if claim else [])
        return "cuda" if name == "auto" else name
    if claim is not None:
        claim.release()
    if name.startswith("cuda"):
        raise typer.BadParameter(
            f"device {name!r} was asked for, but torch sees no CUDA device: "
            "set runtime.device to auto or cpu, or submit to a node with a GPU"
        )
    return "cpu" if name == "auto" else name


def _spare_collections() -> None:
    """Collect garbage less often, and not once more when the process ends.

    torch and transformers make half a million objects that stay until then. Python walks through
    them time and again while they are imported, and at the end: a third of a short job's time.
    """
    gc.set_threshold(7_000)
    atexit.register(gc.freeze)


def run(main: Any, doc: str, spec: type | None = None) -> None:
    """Run a stage's ``main`` as a command whose ``--help`` describes it and its parameters.

    What the user can mend ends it with one message and exit code 1; other errors are the program's
    and show where they come from.
    """

    @functools.wraps(main)
    def guarded(**arguments: Any) -> None:
        try:
            main(**arguments)
        except Exception as error:
            message = explain(error, arguments.get("out") or arguments.get("results"))
            if message is None:
                raise
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(1) from None

    _spare_collections()
    params = f"\n\n--params takes a JSON object. {spec.__doc__}" if spec is not None else ""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=f"{doc}{params}")(guarded)
    app()
