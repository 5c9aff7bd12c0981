"""Peak memory of this process: device memory on CUDA, resident memory on a CPU."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

# Linux keeps the most that was ever resident, and forgets it when told to (proc_pid_clear_refs).
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: str) -> None:
    """Let :func:`peak` begin anew; where the system cannot, it goes on from the start."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def peak(device: str) -> int:
    """The most bytes held at once since :func:`reset_peak`, or since the start.

    Args:
        device: cpu, cuda or cuda:N.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    except (OSError, KeyError):  # no Linux, or one that does not tell
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
