"""Second moments C = E[x x^T] of every decoder linear layer's input, one block at a time.

C is a plain sum of x x^T over real tokens divided by their number: padding is masked out, the sum
is carried in float64 across batches, and older batches weigh as much as newer ones. The result
does not depend on batch size or order beyond float rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eora.streaming import BlockStream, linear_layers

Batch = tuple[Tensor, Tensor | None]  # input_ids (batch, seq), attention_mask or None


class SecondMoment:
    """Running sum of x x^T over tokens: float64 (in, in) on the inputs' device."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add tokens x (tokens, in). The product is float32, its addition float64."""
        x = x.float()
        product = (x.T @ x).double()
        self.sum = product if self.sum is None else self.sum.add_(product)
        self.tokens += len(x)

    def mean(self) -> Tensor:
        """C (in, in) float32: the sum over real tokens divided by their number."""
        if self.sum is None or self.tokens == 0:
            raise ValueError("no token was added")
        return (self.sum / self.tokens).float()


@dataclass
class BlockMoments:
    """Second moments of one block's linear layers; layers that read the same tensor share one.

    shared: layer -> the first layer of the block that reads the same input (k_proj -> q_proj).
    moments: one entry for each layer that leads such a group.
    """

    shared: dict[str, str] = field(default_factory=dict)
    moments: dict[str, SecondMoment] = field(default_factory=dict)

    def hooks(self, layers: dict[str, nn.Module], mask: Tensor | None) -> list[Any]:
        """Forward hooks that add one batch; ``mask`` (batch, seq) bool drops padding."""
        seen: dict[int, tuple[Tensor, str]] = {}  # holds the tensor, so that its id stays its own

        def hook_for(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0]
                _, leader = seen.setdefault(id(x), (x, name))
                if self.shared.setdefault(name, leader) != leader:
                    raise RuntimeError(f"{name} does not read the same input in every batch")
                if leader == name:
                    rows = x.flatten(0, -2) if mask is None else x[mask]
                    self.moments.setdefault(name, SecondMoment()).add(rows)

            return hook

        return [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]


def batches(input_ids: Tensor, lengths: Tensor, size: int) -> list[Batch]:
    """Cut samples into batches, each as wide as its longest sample.

    Args:
        input_ids: (samples, seqlen), right-padded.
        lengths: (samples,) number of real tokens of each.
        size: samples a batch.

    Returns:
        Pairs of input_ids (batch, longest) and attention_mask (same shape, bool), None where
        nothing is padded.
    """
    cut: list[Batch] = []
    for ids, real in zip(input_ids.split(size), lengths.split(size), strict=True):
        width = int(real.max())
        mask = torch.arange(width) < real[:, None]
        cut.append((ids[:, :width].long(), None if bool(mask.all()) else mask))
    return cut


@torch.inference_mode()
def run_shard(
    stream: BlockStream,
    blocks: range,
    data: list[Batch],
    hidden: list[Tensor] | None,
    save_block: Callable[[int, BlockMoments], None],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Tensor]:
    """Run all batches through the shard's blocks and collect their second moments.

    Args:
        stream: the original model.
        blocks: indices of the shard's decoder blocks.
        data: calibration batches.
        hidden: input of the first of ``blocks`` for each batch (batch, seq, hidden), in host
            memory; where it is None, the blocks before are run through first.
        save_block: called with (block index, its moments) as each block ends.
        progress: wraps the block indices, for a progress bar.

    Returns:
        The input of the block after the last one, for each batch, in host memory.
    """
    first = blocks.start
    if hidden is None:
        first = 0
        hidden = [stream.calls(ids, mask)[0].cpu() for ids, mask in data]
    for index in progress(range(first, blocks.stop)):
        moments = BlockMoments()
        with stream.block(index) as block:
            layers = linear_layers(block)
            for i, (ids, mask) in enumerate(data):
                _, calls = stream.calls(ids, mask)
                real = None if mask is None else mask.to(stream.device)
                hooks = moments.hooks(layers, real) if index in blocks else []
                try:
                    output = block(hidden[i].to(stream.device), **calls[index])
                finally:
                    for hook in hooks:
                        hook.remove()
                hidden[i] = (output[0] if isinstance(output, tuple) else output).cpu()
        if index in blocks:
            save_block(index, moments)
    return hidden


def block_file(index: int) -> str:
    """File name of one block's second moments, factors or curves."""
    return f"block-{index:04d}.safetensors"


def block_files(folder: Path) -> list[Path]:
    """All block files of a folder, in the blocks' order."""
    return sorted(folder.glob("block-*.safetensors"))


def save_moments(path: Path, block: BlockMoments) -> None:
    """Write one block's second moments: one (in, in) float32 tensor for each distinct input.

    The file's metadata says which layer uses which tensor and how many tokens were seen.
    """
    tensors = {name: moment.mean().cpu().contiguous() for name, moment in block.moments.items()}
    tokens = {name: moment.tokens for name, moment in block.moments.items()}
    # One entry: safetensors writes several in an order that changes from process to process.
    inputs = json.dumps({"shared": block.shared, "tokens": tokens}, sort_keys=True)
    save_file(tensors, path, {"inputs": inputs})


def load_moments(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What :func:`save_moments` wrote: layer -> leader, and leader -> C (in, in) float32."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["inputs"])["shared"], {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }


def flatten(hidden: list[Tensor], seqlen: int) -> Tensor:
    """Hidden states of all batches as one tensor (samples, seqlen, hidden), padded with zeros."""
    if not hidden:
        return torch.zeros(0, seqlen, 0)
    rows = [torch.nn.functional.pad(h, (0, 0, 0, seqlen - h.shape[1])) for h in hidden]
    return torch.cat(rows)


def rebatch(hidden: Tensor, data: list[Batch]) -> list[Tensor]:
    """The inverse of :func:`flatten` for these batches."""
    sizes = [len(ids) for ids, _ in data]
    parts = hidden.split(sizes)
    return [h[:, : ids.shape[1]].clone() for h, (ids, _) in zip(parts, data, strict=True)]
