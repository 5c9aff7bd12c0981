"""Second moments C = E[x x^T] of every decoder linear layer's input, one block at a time.

C is a plain sum of x x^T over real tokens divided by their number: padding is never multiplied, the
sum is carried in float64 across batches, and older batches weigh as much as newer ones. The result
does not depend on batch size or order beyond float rounding.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eora import triangles
from eora.architectures import Experts, densify, experts, linear_layers
from eora.streaming import BlockStream


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left (m, tokens) @ right (tokens, n), added in float32; 16-bit inputs on a GPU alone."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


class SecondMoment:
    """Running sum of x x^T over tokens: the lower triangle in float64, on the inputs' device."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []  # of rows, see eora.triangles
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add tokens x (tokens, in). Products are float32, their addition float64.

        A product of two 16-bit numbers is exact in float32: a GPU takes them as they are, at the
        speed of its 16-bit units. A CPU has no such kernel.
        """
        if not x.is_cuda:
            x = x.float()
        cuts = triangles.row_blocks(x.shape[1])
        if not self.blocks:
            empty = x.new_zeros(0, dtype=torch.float64)
            self.blocks = [empty.new_zeros(c.stop - c.start, c.stop) for c in cuts]
        for cut, block in zip(cuts, self.blocks, strict=True):
            block += _product(x.T[cut], x[:, : cut.stop])
        self.tokens += len(x)

    @classmethod
    def pooled(cls, moments: list[SecondMoment]) -> SecondMoment:
        """That of all their tokens together."""
        total = cls()
        parts = zip(*(moment.blocks for moment in moments), strict=True)
        total.blocks = [sum(some) for some in parts]
        total.tokens = sum(moment.tokens for moment in moments)
        return total

    def scaled(self, tokens: int) -> SecondMoment:
        """That of ``tokens`` average ones of its tokens."""
        total = SecondMoment()
        total.blocks = [block * (tokens / self.tokens) for block in self.blocks]
        total.tokens = tokens
        return total

    def mean(self) -> Tensor:
        """C, packed (in (in + 1) / 2,) float32: the sum over real tokens divided by their number.

        Raises:
            ValueError: no token was added.
        """
        if not self.tokens:
            raise ValueError("no token was added")
        return triangles.pack([(block / self.tokens).float() for block in self.blocks])


@dataclass(frozen=True)
class Batch:
    """Samples that run together, padded on the right to the longest.

    They need no attention mask: in a causal model no real token looks at what is to its right.

    Attributes:
        input_ids: (batch, longest) int64.
        real: (batch, longest) bool, where tokens are real; None where nothing is padded.
        rows: the batch's real tokens among those of all batches.
    """

    input_ids: Tensor
    real: Tensor | None
    rows: slice

    def pack(self, x: Tensor) -> Tensor:
        """(batch, longest, n), or its first two as one -> the real tokens' (tokens, n)."""
        rows = x.flatten(0, -2)
        return rows if self.real is None else rows[self.real.flatten().to(x.device)]

    def pad(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, with zeros for padding."""
        if self.real is None:
            return rows.unflatten(0, self.input_ids.shape)
        padded = rows.new_zeros(*self.input_ids.shape, rows.shape[1])
        padded[self.real.to(rows.device)] = rows
        return padded


def batches(input_ids: Tensor, lengths: Tensor, size: int) -> list[Batch]:
    """Cut samples into batches of about one length each, the longest first.

    Args:
        input_ids: (samples, seqlen), right-padded.
        lengths: (samples,) number of real tokens of each.
        size: samples a batch.

    Returns:
        Batches; the order of their real tokens does not depend on ``size``.
    """
    order = lengths.argsort(descending=True, stable=True)
    cut: list[Batch] = []
    start = 0
    for chosen in order.split(size):
        width, tokens = int(lengths[chosen].max()), int(lengths[chosen].sum())
        real = torch.arange(width) < lengths[chosen, None]
        cut.append(
            Batch(
                input_ids[chosen, :width].long(),
                None if bool(real.all()) else real,
                slice(start, start := start + tokens),
            )
        )
    return cut


@dataclass
class BlockMoments:
    """Second moments of one block's linear layers; layers that read the same tensor share one.

    shared: layer -> the first layer of the block that reads the same input (k_proj -> q_proj).
    moments: one entry for each layer that leads such a group.
    """

    shared: dict[str, str] = field(default_factory=dict)
    moments: dict[str, SecondMoment] = field(default_factory=dict)

    def hooks(
        self, layers: dict[str, nn.Module], moe: dict[str, Experts], batch: Batch
    ) -> list[Any]:
        """Forward hooks on a block's layers that add one batch.

        A layer of an expert adds the tokens that are routed to it, each times its routing weight:
        by so much the layer's error at this token is multiplied before it reaches the residual
        stream, so the token weighs by the weight's square.

        Args:
            layers: see :func:`linear_layers`.
            moe: the block's experts, see :func:`experts`; told of the padding, they get none.
            batch: what the block is about to be called with.
        """
        for routed in moe.values():
            routed.real = None if batch.real is None else batch.real.flatten()
        seen: dict[int, tuple[Tensor, str]] = {}  # holds the tensor, so that its id stays its own

        def hook_for(name: str) -> Callable:
            owner = next((m for at, m in moe.items() if name.startswith(f"{at}.")), None)

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0]
                _, leader = seen.setdefault(id(x), (x, name))
                if self.shared.setdefault(name, leader) != leader:
                    raise RuntimeError(f"{name} does not read the same input in every batch")
                if leader == name:
                    rows = batch.pack(x) if owner is None else x.float() * owner.routing[:, None]
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


def _room() -> float:
    """Bytes of host memory that hidden states may take.

    Half of what the machine has left, as others take of it too. Of a job's own memory, which its
    cgroups limit, more: jobs ask for a quarter above the plan, so one that was granted it has room
    for the states, whatever share of it they are. Pages of files that were read count as used by a
    cgroup, which gives them up when asked.
    """
    free, granted = psutil.virtual_memory().available, math.inf
    own, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    if own.exists():
        innermost = root / own.read_text().rpartition("::")[2].strip().lstrip("/")
        for group in (innermost, *innermost.parents):
            try:
                limit, used = ((group / f"memory.{n}").read_text() for n in ("max", "current"))
                told = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                granted = min(granted, int(limit) - int(used) + int(told["inactive_file"]))
            except (OSError, ValueError, KeyError):  # no such group, or no limit
                continue
    return free / 2 if math.isinf(granted) else 0.8 * min(free, granted)


class Hidden:
    """Hidden states of all real tokens between two blocks, (tokens, hidden).

    They lie in host memory, pinned for a GPU, or in a file where memory is short. They move to the
    GPU once a block has shown that there is room beside it.

    Args:
        like: one state, for its width, dtype and device.
        tokens: how many.
        spill: folder for the file.
    """

    def __init__(self, like: Tensor, tokens: int, spill: Path):
        self.device = like.device
        size, dtype = tokens * like.numel(), like.dtype
        if size * dtype.itemsize > _room():
            with (spill / "hidden.spilled").open("wb") as file:
                # A full disk is told here; met in the mapping, it would kill the process.
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            states = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        else:
            states = torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")
        self.states = states.view(tokens, like.numel())

    def settle(self) -> None:
        """Move to the GPU if that has room beside the most that the blocks took so far."""
        if self.device.type != "cuda" or self.states.is_cuda:
            return
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        if self.states.nbytes < 0.9 * free - torch.cuda.max_memory_allocated(self.device):
            self.states = self.states.to(self.device)


def _run_block(
    stream: BlockStream,
    index: int,
    data: list[Batch],
    hidden: Hidden,
    moments: BlockMoments | None,
) -> None:
    """Take all hidden states through one block; add its inputs to ``moments``, if given."""
    with stream.block(index) as block:
        densify(block, hidden.states.dtype)
        layers, moe = linear_layers(block), experts(block)
        for batch in data:
            states = batch.pad(hidden.states[batch.rows].to(stream.device, non_blocking=True))
            calls = stream.calls(*batch.input_ids.shape)
            hooks = [] if moments is None else moments.hooks(layers, moe, batch)
            try:
                output = block(states, **calls[index])
            finally:
                for hook in hooks:
                    hook.remove()
            output = output[0] if isinstance(output, tuple) else output
            hidden.states[batch.rows] = batch.pack(output)


@torch.inference_mode()
def run_shard(
    stream: BlockStream,
    blocks: range,
    data: list[Batch],
    before: Tensor | None,
    spill: Path,
    save_block: Callable[[int, BlockMoments], None],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Run all batches through the shard's blocks and collect their second moments.

    Args:
        stream: the original model, or a compressed one: packed layers run as the dense ones that
            they stand for, one block of them at a time.
        blocks: indices of the shard's decoder blocks.
        data: calibration batches.
        before: what the shard before returned; where it is None, the blocks before are run first.
        spill: folder for hidden states that memory has no room for.
        save_block: called with (block index, its moments) as each block ends.
        progress: wraps the block indices, for a progress bar.

    Returns:
        The input of the block after the last one: (real tokens of all batches, hidden).
    """
    like = stream.embed(data[0].input_ids[:1, :1])
    hidden = Hidden(like, data[-1].rows.stop, spill)
    if before is None:
        for batch in data:
            hidden.states[batch.rows] = batch.pack(stream.embed(batch.input_ids))
    else:
        hidden.states.copy_(before)
    for index in progress(range(0 if before is None else blocks.start, blocks.stop)):
        moments = BlockMoments() if index in blocks else None
        _run_block(stream, index, data, hidden, moments)
        if moments is not None:
            save_block(index, moments)
        hidden.settle()
    return hidden.states


def save_moments(path: Path, block: BlockMoments) -> None:
    """Write one block's second moments: for each distinct input a packed float32 triangle.

    The file's metadata says which layer uses which tensor and how many tokens were seen.
    """
    tensors = {name: moment.mean() for name, moment in block.moments.items()}
    tokens = {name: moment.tokens for name, moment in block.moments.items()}
    # One entry: safetensors writes several in an order that changes from process to process.
    inputs = json.dumps({"shared": block.shared, "tokens": tokens}, sort_keys=True)
    save_file(tensors, path, {"inputs": inputs})


class Moments:
    """What :func:`save_moments` wrote, read as it is asked for.

    Attributes:
        shared: layer -> the name of the input that it reads.
    """

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self.shared: dict[str, str] = json.loads(self._file.metadata()["inputs"])["shared"]

    def lower(self, name: str) -> Tensor:
        """The lower triangle of one input's C: (in, in) float32, zero above the diagonal."""
        return triangles.unpack(self._file.get_tensor(name))
