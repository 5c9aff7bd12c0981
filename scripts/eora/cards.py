"""Which card a GPU job takes where several jobs share a machine: one that no other job has.

Snakemake counts cards (``--resources gpu=4``) but tells no job which one is its own. So each job
locks a file that stands for a card, and shows CUDA that card alone. The lock ends with the process,
however it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Not the folder of TMPDIR: a job may have one of its own.
LOCKS = Path("/tmp/eoraflow-cards")

_LINE = re.compile(r"^(?P<indent>\s*)(GPU|MIG)\b.*\(UUID: (?P<uuid>\S+)\)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """A card of the machine: its UUID, and the UUIDs of the MIG instances that it is split into."""

    uuid: str
    instances: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What jobs can have of it."""
        return self.instances or (self.uuid,)


def parse(listing: str) -> list[Card]:
    """The cards of what ``nvidia-smi -L`` prints, in the order of their indices."""
    found: list[Card] = []
    for line in listing.splitlines():
        if match := _LINE.match(line):
            if match["indent"] and found:
                found[-1] = Card(found[-1].uuid, (*found[-1].instances, match["uuid"]))
            else:
                found.append(Card(match["uuid"]))
    return found


def listed() -> list[Card]:
    """This machine's cards; none where there is no working ``nvidia-smi``."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run([program, "-L"], capture_output=True, text=True)
    return parse(done.stdout) if done.returncode == 0 else []


def usable(cards: list[Card], visible: str | None) -> list[str]:
    """UUIDs of what a process may use, in its order.

    Args:
        cards: those of the machine.
        visible: value of CUDA_VISIBLE_DEVICES: indices, UUIDs or beginnings of UUIDs, up to the
            first that names nothing, as CUDA reads it; None where it is not set.
    """
    if visible is None:
        return [part for card in cards for part in card.parts]
    found: dict[str, None] = {}
    for name in visible.split(","):
        parts = _named(cards, name.strip())
        if not parts:
            break
        found.update(dict.fromkeys(parts))
    return list(found)


def _named(cards: list[Card], name: str) -> tuple[str, ...]:
    """What an index, or the beginning of one UUID alone, stands for."""
    if re.fullmatch(r"[0-9]+", name):
        return cards[int(name)].parts if int(name) < len(cards) else ()
    if not name.startswith(("GPU-", "MIG-")):
        return ()
    # Instances of a card may bear its UUID (MIG-GPU-.../1/0): a whole name goes before beginnings.
    names = {card.uuid: card.parts for card in cards}
    names |= {part: (part,) for card in cards for part in card.instances}
    found = [name] if name in names else [known for known in names if known.startswith(name)]
    return names[found[0]] if len(found) == 1 else ()


def _lock(part: str) -> FileLock:
    """The lock of a card: one for all users of the machine, or for those in a SLURM allocation.

    What SLURM gives to a job is the job's own, or shared with others by SLURM's will: only
    processes inside one allocation have to agree.
    """
    allocation = os.environ.get("SLURM_JOB_ID")
    name = part.replace("/", "_") + (f"-slurm-{allocation}" if allocation else "")
    return FileLock(LOCKS / f"{name}.lock", timeout=0, mode=0o666)


def _make_folder() -> None:
    """Where every user may make files and nobody removes another's, as in /tmp."""
    mask = os.umask(0)
    LOCKS.mkdir(mode=0o1777, exist_ok=True)
    os.umask(mask)


class Claim:
    """A card that is this process's alone, until the process ends or releases it."""

    def __init__(self, uuid: str, lock: FileLock):
        self.uuid = uuid
        self._lock = lock
        self._before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = uuid

    def release(self) -> None:
        """Give the card back, and put the environment as it was."""
        if self._before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = self._before
        self._lock.release()


def claim(poll: float = 1.0) -> Claim | None:
    """Take a free one of the cards that this process may use; where none is free, wait for one.

    Call it before anything initialises CUDA, which reads CUDA_VISIBLE_DEVICES once, and keep what
    it returns: the card is free when that is gone.

    Args:
        poll: seconds between two looks at cards that are all taken.

    Returns:
        None, at once, where there is no card to take: the machine has none, or none is visible.
    """
    cards = listed()
    if not cards:
        return None
    visible = os.environ.get(VISIBLE)
    parts = usable(cards, visible)
    if not parts:
        _log.warning("%s=%s names none of this machine's cards.", VISIBLE, visible)
        return None
    _make_folder()
    for look in itertools.count():
        for part in parts:
            with contextlib.suppress(Timeout):
                lock = _lock(part)
                lock.acquire()
                _log.info("This job's card: %s", part)
                return Claim(part, lock)
        if look == 0:
            _log.info(
                "Other jobs hold all %d cards that this one may use (%s): waiting for one. "
                "--resources gpu=%d starts no more GPU jobs at once than that.",
                len(parts),
                ", ".join(parts),
                len(parts),
            )
        time.sleep(poll)
