"""A stage's result: restored where an equal one is kept, else filled, sealed and published.

What a stage makes appears in its folder by renames, the manifest last: its presence means that
everything it names is whole. A job that dies leaves no manifest, never a half one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eora import manifest, store


@dataclass(frozen=True)
class Result:
    """One run of a stage.

    Attributes:
        out: the stage's output folder; what an earlier run left in it under the same names goes.
        stage: the stage's name.
        params: everything of the config that changes the result, with the stage's ``version``.
        inputs: name -> what the result is made from (see :func:`manifest.digest`), or None.
        tools: installed packages whose versions are recorded.
        volatile: top-level names left out of the manifest: measurements, which differ each time.
        passing: top-level names left out of manifest and store: files that a later stage deletes.
        kept: folder of the store that equal results are restored from; None for no store.
    """

    out: Path
    stage: str
    params: dict[str, Any]
    inputs: Mapping[str, Path | None] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    volatile: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()
    kept: Path | None = None

    @cached_property
    def recipe(self) -> manifest.Manifest:
        """What the result is made from and with: two results of one recipe are the same."""
        return {
            "stage": self.stage,
            "version": self.params.get("version"),
            "params": self.params,
            "inputs": {
                name: manifest.digest(path)
                for name, path in self.inputs.items()
                if path is not None
            },
            "tools": manifest.versions(self.tools),
        }

    def restored(self) -> bool:
        """Publish the kept result of the same recipe, if there is one."""
        if self.kept is None:
            return False
        with self._partial() as partial:
            found = store.restore(self.kept, self.recipe, partial)
            if found:
                self._move(partial)
        return found

    @contextmanager
    def publish(self, notes: dict[str, Any] | None = None) -> Iterator[Path]:
        """Yield an empty folder to fill; on success seal it, keep it and move it into ``out``.

        ``notes``, further facts for the manifest, may be filled while the context is open.
        """
        with self._partial() as partial:
            yield partial
            manifest.seal(partial, self.recipe, self.volatile + self.passing, notes)
            if self.kept is not None:
                store.keep(self.kept, self.recipe, partial, self.passing)
            self._move(partial)

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / manifest.NAME).unlink(missing_ok=True)
        for stray in self.out.glob(".partial-*"):  # left by a job that was killed
            shutil.rmtree(stray)
        partial = self.out / f".partial-{os.getpid()}"
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _move(self, partial: Path) -> None:
        for path in sorted(partial.iterdir(), key=lambda path: path.name == manifest.NAME):
            target = self.out / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)
