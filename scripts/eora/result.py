"""A stage's result: restored where an equal one is kept, else filled, sealed and published.

What a stage makes appears in its folder by renames, the manifest last: its presence means that
everything it names is whole. A job that dies leaves no manifest, never a half one.

Two copies of one job may live at once: a cluster that lost sight of a node starts the node's jobs
again elsewhere. Each writes aside under a name of its own, they publish one after the other, and
the first result stays, as others may be reading it. Locks tell the living from the dead, on every
node that the folder is mounted on, since they end with the process.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eora import manifest, store

LOCK = ".lock"  # held while an output folder is changed
_ALIVE = "alive"  # held by the process that a partial result belongs to
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_log = logging.getLogger(__name__)


@contextmanager
def _locked(file: Path, timeout: float = -1) -> Iterator[bool]:
    """Hold the lock of a file, which is made if need be.

    Yields:
        False where the file system has no locks.

    Raises:
        Timeout: another process holds it. Never with a negative ``timeout``, which waits.
    """
    lock = FileLock(file, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.debug("%s cannot be locked: %s", file, error)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _abandoned(partial: Path) -> bool:
    """Whether the process that was filling a partial result is known to be gone."""
    try:
        with _locked(partial / _ALIVE, timeout=0) as held:
            return held
    except (Timeout, FileNotFoundError):  # at work; or it removed its folder just now
        return False


def open_to_others(folder: Path) -> None:
    """Give new files the permissions that the user's umask asks for.

    safetensors writes files that their owner alone can read, which is of no use where a group
    shares its results. Files that are also linked elsewhere are somebody else's: they stay.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(path.stat().st_mode | (0o666 & ~umask))


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
            open_to_others(partial)
            manifest.seal(partial, self.recipe, self.volatile + self.passing, notes)
            if self.kept is not None:
                store.keep(self.kept, self.recipe, partial, self.passing)
            self._move(partial)

    @contextmanager
    def progress(self) -> Iterator[Path]:
        """Yield a folder that outlives a job that dies: the next one of the same recipe finds it.

        It goes when the context ends without an error, and so does what another recipe left. Of two
        copies of a job that live at once the second has an empty one of its own.
        """
        own = self.out / f".progress-{manifest.digest_of(self.recipe)[:16]}"
        for other in self.out.glob(".progress-*"):
            if other != own and _abandoned(other):
                shutil.rmtree(other, ignore_errors=True)
        own.mkdir(exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(_locked(own / _ALIVE, timeout=0))
            except Timeout:
                own = self.out / f".progress-{secrets.token_hex(8)}"
                own.mkdir()
                held.enter_context(_locked(own / _ALIVE))
            yield own
            shutil.rmtree(own)

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        self.out.mkdir(parents=True, exist_ok=True)
        own = self.out / f".partial-{secrets.token_hex(4)}-{os.getpid()}"
        with ExitStack() as alive:
            with _locked(self.out / LOCK):
                (self.out / manifest.NAME).unlink(missing_ok=True)
                for stray in filter(_abandoned, self.out.glob(".partial-*")):
                    shutil.rmtree(stray, ignore_errors=True)
                alive.callback(shutil.rmtree, own, ignore_errors=True)
                (own / "result").mkdir(parents=True)
                alive.enter_context(_locked(own / _ALIVE))
            yield own / "result"

    def _move(self, partial: Path) -> None:
        with _locked(self.out / LOCK):
            if (self.out / manifest.NAME).exists():
                _log.warning(
                    "Another copy of this job was faster; its result in %s stays.", self.out
                )
                return
            for path in sorted(partial.iterdir(), key=lambda path: path.name == manifest.NAME):
                target = self.out / path.name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                path.replace(target)
