"""GPTQ (arXiv 2210.17323), AWQ (2306.00978), SparseGPT (2301.00774) and Wanda (2306.11695), by
llm-compressor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eora import layers, smoothing
from eora.architectures import linear_layers
from eora.errors import Mistake
from eora.streaming import BlockStream

# Tokens that tell whether a rescaled model still gives the original's logits, and how far rounding
# to 16 bits in each layer may take those, relative to their norm.
LOOK = 64
ROUNDING = 0.1


def pattern(sparsity: str) -> tuple[float, str]:
    """The share of weights that become zero, and llm-compressor's name of the mask's structure.

    Args:
        sparsity: ``2:4`` (two of every four along a layer's input), or a share such as ``0.5``.
    """
    zeros, _, of = sparsity.partition(":")
    return (int(zeros) / int(of), sparsity) if of else (float(zeros), "0:0")


def _groups(bits: int, group_size: int, sym: bool) -> dict[str, Any]:
    """compressed-tensors' scheme of integer weights; -1 is a whole row."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": sym}
    if group_size > 0:
        weights |= {"strategy": "group", "group_size": group_size}
    else:
        weights |= {"strategy": "channel"}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


@contextmanager
def _without_pinning() -> Iterator[None]:
    """Keep llm-compressor from pinning memory for a GPU where there is none, which ends its AWQ."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


@contextmanager
def _known_to_awq(model: nn.Module) -> Iterator[None]:
    """Name the mistake where llm-compressor finds no layers by the names that it has for them."""
    try:
        yield
    except ValueError as error:
        if "re:" not in str(error):
            raise
        raise Mistake(
            f"compressions.<name>.method: llm-compressor's awq does not know which norm stands "
            f"before which layer of {type(model).__name__}; name another method ({error})"
        ) from error


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Of the first few tokens, with the weights as they are before they are rounded; float32."""
    from llmcompressor.utils import DisableQuantization

    with torch.inference_mode(), DisableQuantization(model):
        return model(input_ids[:1, :LOOK]).logits.float().cpu()


def _check_same(before: Tensor, after: Tensor, model: nn.Module) -> None:
    """Refuse a model that is another one once channels are rescaled.

    Of a class that llm-compressor has no names for it takes Llama's without a word, though what
    stands between two layers may not let scales through.
    """
    gap = ((after - before).norm() / before.norm()).item()
    if not gap <= ROUNDING:
        raise Mistake(
            f"compressions.<name>.method: awq does not fit {type(model).__name__}: rescaled, and "
            f"before any rounding, its logits are {gap:.0%} off; name another method"
        )


def _rescaled(original: BlockStream, model: nn.Module) -> Iterator[tuple[str, smoothing.Scales]]:
    """Layers whose inputs or outputs AWQ rescaled: its weights are rounded when they are saved."""
    for index in range(len(original)):
        with original.block(index) as block:
            for local, layer in linear_layers(block).items():
                name = f"{original.name(index)}.{local}"
                after = model.get_submodule(name).weight.detach().cpu()
                if not layer.weight.equal(after):
                    yield name, smoothing.between(layer.weight, after)


def compress(
    folder: Path,
    out: Path,
    input_ids: Tensor,
    *,
    method: str,
    keep: list[str],
    bits: int | None = None,
    group_size: int = -1,
    sym: bool = False,
    sparsity: str = "",
    trust_remote_code: bool = False,
) -> None:
    """Compress the decoder's linear layers block by block; save a folder that transformers loads.

    Rounded layers are packed (compressed-tensors); a pruned model that is not rounded is a plain
    checkpoint with zeros in it. What was pruned is rounded to nearest, which leaves zeros at zero:
    llm-compressor's GPTQ would spread its errors to them.

    llm-compressor takes the first GPU that it sees, if any: see :func:`eora.cli.device`.

    Args:
        folder: the original model; all of it is in host memory, a block at a time on the device.
        out: the folder to make; AWQ's scales are written beside it.
        input_ids: (samples, seqlen) calibration tokens, every sample full.
        method: ``gptq`` or ``awq``, or ``sparsegpt`` or ``wanda``, which prune.
        keep: layers left as they are: parts of their names.
        bits: of the rounding; None does not round.
        group_size: weights that share a scale; -1 is a whole row.
        sym: no zero points.
        sparsity: see :func:`pattern`; of the methods that prune.

    Raises:
        Mistake: the settings, or the method, do not fit the model's layers.
    """
    skeleton = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    layers.check_plain(skeleton, "compressions.<name>.method")
    groups = -1 if bits is None else group_size
    chosen = set(layers.chosen(skeleton, groups, keep))
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from loguru import logger
    from torch.utils.data import DataLoader

    from eora.loading import load_original

    logger.disable("llmcompressor.utils.metric_logging")  # two lines a layer
    model, tokenizer = load_original(folder, trust_remote_code)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ignore = sorted(linear - chosen)
    samples = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in input_ids.long()]
    calibrated = {
        "dataset": DataLoader(samples, batch_size=1),
        "num_calibration_samples": len(samples),
        "max_seq_length": input_ids.shape[1],
        "pipeline": "sequential",
    }
    common = {"tokenizer": tokenizer, "trust_remote_code_model": trust_remote_code}
    rounding = None if bits is None else _groups(bits, group_size, sym)
    if method == "gptq":
        gptq = GPTQModifier(config_groups=rounding, ignore=ignore)
        oneshot(model, recipe=[gptq], **calibrated, **common)
    elif method == "awq":
        nearest = QuantizationModifier(config_groups=rounding, ignore=ignore)
        before = _logits(model, input_ids.long())
        with _without_pinning(), _known_to_awq(model):
            oneshot(model, recipe=[AWQModifier(), nearest], **calibrated, **common)
        _check_same(before, _logits(model, input_ids.long()), model)
        smoothing.save(out.parent / smoothing.NAME, dict(_rescaled(skeleton, model)))
    else:
        share, structure = pattern(sparsity)
        kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
        # By name: of a class's layers it prunes those that it is told to ignore, the head too.
        pruner = kind(sparsity=share, mask_structure=structure, targets=sorted(chosen))
        oneshot(model, recipe=[pruner], **calibrated, **common)
        if rounding is not None:  # by the range of what is left
            nearest = QuantizationModifier(config_groups=rounding, ignore=ignore)
            oneshot(model, recipe=[nearest], pipeline="datafree", **common)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
