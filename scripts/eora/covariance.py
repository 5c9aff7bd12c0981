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

from eora.architectures import Experts, experts, linear_layers
from eora.streaming import BlockStream

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

    @classmethod
    def pooled(cls, moments: list[SecondMoment]) -> SecondMoment:
        """That of all their tokens together."""
        total = cls()
        total.sum = sum(moment.sum for moment in moments)
        total.tokens = sum(moment.tokens for moment in moments)
        return total

    def scaled(self, tokens: int) -> SecondMoment:
        """That of ``tokens`` average ones of its tokens."""
        total = SecondMoment()
        total.sum, total.tokens = self.sum * (tokens / self.tokens), tokens
        return total

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

    def hooks(
        self, layers: dict[str, nn.Module], mask: Tensor | None, moe: dict[str, Experts]
    ) -> list[Any]:
        """Forward hooks that add one batch; ``mask`` (batch, seq) bool drops padding.

        A layer of an expert adds the tokens that are routed to it, each times its routing weight:
        by so much the layer's error at this token is multiplied before it reaches the residual
        stream, so the token weighs by the weight's square.

        Args:
            layers: see :func:`linear_layers`.
            moe: the block's experts, see :func:`experts`; told of the padding, they get none.
        """
        for routed in moe.values():
            routed.real = None if mask is None else mask.flatten()
        seen: dict[int, tuple[Tensor, str]] = {}  # holds the tensor, so that its id stays its own

        def hook_for(name: str) -> Callable:
            owner = next((m for at, m in moe.items() if name.startswith(f"{at}.")), None)

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0]
                _, leader = seen.setdefault(id(x), (x, name))
                if self.shared.setdefault(name, leader) != leader:
                    raise RuntimeError(f"{name} does not read the same input in every batch")
                if leader == name:
                    rows = x.flatten(0, -2)
                    if owner is not None:
                        rows = rows.float() * owner.routing[:, None]
                    elif mask is not None:
                        rows = rows[mask.flatten()]
                    self.moments.setdefault(name, SecondMoment()).add(rows)

            return hook

        return [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]


# What an expert's layers read: the first that reads it -> all that do.
_EXPERT_INPUTS = {"gate_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def fill_experts(block: BlockMoments, moe: dict[str, Experts], minimum: int) -> dict[str, int]:
    """Make up for the tokens that a block's experts did not see, in place.

    An expert that fewer than ``minimum`` tokens were routed to counts as if average ones had been
    routed to it as well, up to that number: with the sum S over its n tokens and the mean P over
    all tokens of all experts beside it, for inputs of the same kind (of gate and up, or of down),
    its second moment is ``(S + (minimum - n) P) / minimum``. Few tokens span few directions, so
    its own moment would leave errors in all others for free. What it did see still counts, and at
    ``minimum`` tokens nothing jumps. An expert that saw none takes P.

    Args:
        block: after all batches.
        moe: the block's experts.
        minimum: at least 1.

    Returns:
        Local name -> number of its own tokens, of the experts that were made up for.
    """
    few: dict[str, int] = {}
    for name, module in moe.items():
        for leader, readers in _EXPERT_INPUTS.items():
            own = [block.moments.get(f"{name}.{i}.{leader}") for i in range(module.size)]
            pool = SecondMoment.pooled([moment for moment in own if moment is not None])
            for i, moment in enumerate(own):
                expert = f"{name}.{i}"
                tokens = 0 if moment is None else moment.tokens
                if tokens >= minimum:
                    continue
                few[expert] = tokens
                filled = pool.scaled(minimum - tokens)
                if moment is not None:
                    filled = SecondMoment.pooled([moment, filled])
                block.moments[f"{expert}.{leader}"] = filled
                for reader in readers:
                    block.shared[f"{expert}.{reader}"] = f"{expert}.{leader}"
    return few


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
            layers, moe = linear_layers(block), experts(block)
            for i, (ids, mask) in enumerate(data):
                _, calls = stream.calls(ids, mask)
                real = None if mask is None else mask.to(stream.device)
                hooks = moments.hooks(layers, real, moe) if index in blocks else []
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
