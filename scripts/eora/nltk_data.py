"""NLTK's data that lm-eval's tasks ask for as they are imported (IFEval: punkt_tab).

The stage that may use the network puts them beside the task, those that may not find them there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eora.errors import Mistake

_log = logging.getLogger(__name__)


def _find(places: list[Path], name: str) -> Path | None:
    """A package of NLTK's data, as a folder or a zip file: ``<place>/<kind>/<name>``."""
    found = (path for place in places for path in sorted(place.glob(f"*/{name}*")))
    return next((path for path in found if path.name in (name, f"{name}.zip")), None)


@contextmanager
def kept(folder: Path, *, network: bool) -> Iterator[list[str]]:
    """While this is open, what is asked of ``nltk.download`` is put into ``folder``.

    It is copied from where NLTK looks on this machine (NLTK_DATA, ~/nltk_data and others), or else
    fetched. Whoever looks before asking finds nothing, so that everything is asked for.

    Args:
        folder: for the data; NLTK must look there.
        network: whether they may be fetched; if not, they must be in ``folder``.

    Yields:
        The names of what was asked for, in the end.

    Raises:
        Mistake: something cannot be had.
    """
    import nltk

    download, places = nltk.download, nltk.data.path[:]
    asked: list[str] = []

    def fetch(name: str, *_: object, **__: object) -> bool:
        asked.append(name)
        if _find([folder], name):
            return True
        if not network:
            raise Mistake(
                f"{folder}: NLTK's {name}, which this task needs, is missing; have the task "
                "prepared again: snakemake --forcerun prepare_task"
            )
        if local := _find([Path(place) for place in places], name):
            _log.info("NLTK's %s is copied from %s", name, local)
            target = folder / local.parent.name / local.name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if local.is_dir() else shutil.copyfile)(local, target)
            return True
        try:
            return download(name, download_dir=str(folder), quiet=True, raise_on_error=True)
        except (ValueError, OSError) as error:
            raise Mistake(
                f"tasks.<name>.lm_eval: this task needs NLTK's {name}, which cannot be fetched "
                f"({error}); where there is a network, run python -m nltk.downloader -d FOLDER "
                f"{name}, bring FOLDER here, and name it in the environment variable NLTK_DATA"
            ) from error

    nltk.download, nltk.data.path[:] = fetch, []
    try:
        yield asked
    finally:
        nltk.download, nltk.data.path[:] = download, places
