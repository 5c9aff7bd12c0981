"""Errors that the user can mend, told apart from those of the program.

A :class:`Mistake` is shown as its message alone, so the message says all: what is wrong, in which
key or file, and the mend. Any other error is the program's and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)


class Mistake(ValueError):
    """Something in the config, the data or the machine that the user can mend."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int | None:
    """The operating system's number for what went wrong, also where Rust code wrote the file."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def explain(error: BaseException, out: Path | None) -> str | None:
    """The user's message for an error: a mistake's own, or that ``out`` cannot be written.

    Args:
        error: what ended the work.
        out: folder that the work was writing to.

    Returns:
        None where the error is the program's.
    """
    causes = [(cause, _code(cause)) for cause in _chain(error)]
    for _, code in causes if out is not None else ():
        if code in _FULL:
            free = shutil.disk_usage(_existing(out)).free
            return (
                f"{out}: {os.strerror(code)}. Nothing half-made is left; now {free / 1e6:,.1f} MB "
                "are free there. Free more, or set results to a folder on a larger disk"
            )
    if isinstance(error, Mistake):
        return str(error)
    for cause, code in causes:
        name = getattr(cause, "filename", None)
        if name is None:
            continue
        if code in _CLOSED:
            return f"{name}: {os.strerror(code)}. Give this user access, or name another place"
        if code in _IN_THE_WAY and out is not None and Path(name) in (out, *out.parents):
            return (
                f"{_existing(out)}: a file lies where a folder goes. "
                "Move it, or set results to another place"
            )
    return None
