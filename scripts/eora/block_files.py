"""Names of the files that hold one decoder block's tensors."""

from __future__ import annotations

from pathlib import Path


def name(index: int) -> str:
    """File name of one block's second moments, factors or curves."""
    return f"block-{index:04d}.safetensors"


def listed(folder: Path) -> list[Path]:
    """All block files of a folder, in the blocks' order."""
    return sorted(folder.glob("block-*.safetensors"))
