"""What a model consists of, from the names and shapes of its tensors alone: layers, blocks, inputs.

The tensors are told by the manifest of the model's download, by the headers of its files, or by the
skeleton that transformers makes of its config.json. Needs no torch, but for that skeleton.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eora import config as cfg
from eora import manifest
from eora.errors import Mistake

Tensors = Mapping[str, Mapping[str, Any]]  # name -> {dtype, shape}, as manifests have them

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}  # all others: 1

# Layers that read one input, by the last part of their names; every other layer has its own.
_TOGETHER = {
    name: names[0]
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
    for name in names
}
# Small layers that choose among experts, or weigh them: they are no part of any stage's work.
_ROUTERS = ("mlp.gate", "router", "block_sparse_moe.gate", "shared_expert_gate")


def shard_range(shard: int, shards: int, blocks: int) -> range:
    """Blocks of shard k of K in a model of L: floor(kL/K) to floor((k+1)L/K)."""
    return range(shard * blocks // shards, (shard + 1) * blocks // shards)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block, or all experts' layers of one name.

    Attributes:
        name: within the block; an expert's number is a star.
        rows, columns: its width out and in.
        copies: experts.
        active: how many of them a token goes through.
    """

    name: str
    rows: int
    columns: int
    copies: int = 1
    active: int = 1

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.copies

    def rank(self, rank: int) -> int:
        """The rank, or the layer's width where that is smaller."""
        return min(rank, self.rows, self.columns)


@dataclass(frozen=True)
class Block:
    """A decoder block: its linear layers, and how many parameters it has in all."""

    layers: tuple[Layer, ...]
    parameters: int

    @cached_property
    def inputs(self) -> tuple[Layer, ...]:
        """The first layer of those that read one input, for each distinct input."""
        led: dict[tuple[str, str], Layer] = {}
        for layer in self.layers:
            parent, _, leaf = layer.name.rpartition(".")
            led.setdefault((parent, _TOGETHER.get(leaf, leaf)), layer)
        return tuple(led.values())

    @property
    def active(self) -> int:
        """Parameters of linear layers that a token goes through."""
        return sum(layer.rows * layer.columns * layer.active for layer in self.layers)


@dataclass(frozen=True)
class Shapes:
    """What the costs of a model follow from.

    Attributes:
        blocks: its decoder blocks.
        outside: parameters of embeddings, head and norms.
        hidden, vocabulary: width of the hidden states, and of the logits.
        bytes: of a stored weight.
    """

    blocks: tuple[Block, ...]
    outside: int
    hidden: int
    vocabulary: int
    bytes: int

    @property
    def parameters(self) -> int:
        return self.outside + sum(block.parameters for block in self.blocks)

    @property
    def stored(self) -> int:
        """Bytes of the checkpoint."""
        return self.parameters * self.bytes

    @property
    def layers(self) -> Iterator[Layer]:
        for block in self.blocks:
            yield from block.layers

    @property
    def largest(self) -> Block:
        return max(self.blocks, key=lambda block: block.parameters)

    def share(self, shard: int, shards: int) -> tuple[Block, ...]:
        """The blocks of one shard."""
        return tuple(self.blocks[i] for i in shard_range(shard, shards, len(self.blocks)))


def shapes(tensors: Tensors, experts: int = 1) -> Shapes:
    """A model's shapes from those of its tensors.

    Args:
        tensors: of the whole model, as its files or its code name them.
        experts: how many a token goes through, where the model has some.

    Raises:
        Mistake: nothing in them looks like decoder blocks.
    """
    blocks: dict[str, dict[int, dict[str, list[int]]]] = {}
    rest: dict[str, list[int]] = {}
    for name, entry in tensors.items():
        found = re.match(r"(.*?)\.?\b(\d+)\.(.+)", name)
        if found:
            prefix, index, local = found.groups()
            blocks.setdefault(prefix, {}).setdefault(int(index), {})[local] = entry["shape"]
        else:
            rest[name] = entry["shape"]
    size = {
        prefix: sum(math.prod(shape) for block in some.values() for shape in block.values())
        for prefix, some in blocks.items()
    }
    tables = [shape for shape in rest.values() if len(shape) == 2]
    if not blocks or not tables:
        raise Mistake("the model's tensors are not those of decoder blocks; name another model")
    decoder = max(size, key=lambda prefix: size[prefix])
    vocabulary, hidden = max(tables, key=math.prod)
    dtype = next(e["dtype"] for n, e in tensors.items() if n.startswith(decoder))
    return Shapes(
        blocks=tuple(_block(blocks[decoder][i], experts) for i in sorted(blocks[decoder])),
        outside=sum(map(math.prod, rest.values())) + sum(size.values()) - size[decoder],
        hidden=hidden,
        vocabulary=vocabulary,
        bytes=_BYTES.get(dtype, 1),
    )


def _block(tensors: dict[str, list[int]], experts: int) -> Block:
    layers: dict[str, Layer] = {}
    for name, rows, columns, copies in _linear(tensors):
        copies += layers[name].copies if name in layers else 0
        active = min(experts, copies) if "*" in name else 1
        layers[name] = Layer(name, rows, columns, copies, active)
    return Block(tuple(layers.values()), sum(map(math.prod, tensors.values())))


def _linear(tensors: dict[str, list[int]]) -> Iterator[tuple[str, int, int, int]]:
    """Name, width out and in, and copies of all linear layers; experts as if each had its own."""
    for local, shape in tensors.items():
        name = re.sub(r"\.\d+\.", ".*.", local.removesuffix(".weight"))
        if name.endswith(_ROUTERS):
            continue
        if len(shape) == 3 and "experts" in name:  # fused: (experts, out, in)
            parent, _, leaf = name.rpartition(".")
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            for part in parts:
                yield f"{parent}.*.{part}", shape[1] // len(parts), shape[2], shape[0]
        elif len(shape) == 2 and local.endswith(".weight"):
            bias = tensors.get(f"{local.removesuffix('.weight')}.bias")
            transposed = bias is not None and bias != shape[:1]  # GPT-2's layers: (in, out)
            yield name, *(reversed(shape) if transposed else shape), 1


def _active_experts(config_json: Path) -> int:
    """How many experts a token goes through, by a model's config.json; 1 where it has none."""
    if not config_json.is_file():
        return 1
    config = json.loads(config_json.read_text())
    inner = {**config, **config.get("text_config", {})}
    return inner.get("num_experts_per_tok") or inner.get("moe_topk") or 1


def known(entry: cfg.Config, made: Path) -> Shapes | None:
    """What can be told of a model before any job runs, and as soon as it is downloaded.

    Args:
        entry: the model's entry in the config.
        made: folder that its download goes to.

    Returns:
        Its shapes; None where neither its download nor a local folder with weights is there.

    Raises:
        Mistake: there are no decoder blocks in it, or the folder's weights are not whole.
    """
    weights = cfg.known_weights(entry, made / manifest.NAME)
    if weights is None:
        return None
    folder = made / "model" if made.is_dir() else Path(entry["path"]).expanduser()
    return shapes(manifest.tensors(weights), _active_experts(folder / "config.json"))


def declared(folder: Path, trust_remote_code: bool = False) -> Shapes:
    """The shapes that a config.json calls for: of transformers' skeleton, without weights.

    Args:
        folder: holds config.json.
        trust_remote_code: run model code that the folder carries.

    Raises:
        Mistake: transformers makes no causal language model of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Mistake(
            f"{folder / 'config.json'}: transformers makes no causal language model of it "
            f"({reason}); name another model, or download this one first"
        ) from None
    dtype = {torch.float32: "F32", torch.float16: "F16"}.get(config.dtype, "BF16")
    tensors = {n: {"dtype": dtype, "shape": [*p.shape]} for n, p in model.named_parameters()}
    return shapes(tensors, _active_experts(folder / "config.json"))
