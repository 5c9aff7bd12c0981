"""Checkpoints that somebody else compressed: taken over as they are, after a look at each layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from eora import sources
from eora.architectures import dense_weight, experts, linear_layers
from eora.errors import Mistake
from eora.formats import COMPRESSED_TENSORS, quantization, quantization_format, read_config
from eora.streaming import BlockStream

FORMATS = ("auto-round", "gptq", COMPRESSED_TENSORS)
# Norms and biases are stored in 16 bits on both sides at worst: that far they may differ.
ROUNDING = 0.01
# Of the weights' norm: 2-bit rounding costs up to a half of it, another model's weights 1.4.
LARGEST_ERROR = 0.9
# Of an embedding, compared at a time.
ROWS = 4096


def _check_format(folder: Path, trust_remote_code: bool) -> str | None:
    """The checkpoint's format; refuse those that cannot be read layer by layer."""
    config = read_config(folder, trust_remote_code)
    form = quantization_format(config)
    if form is not None and form not in FORMATS:
        raise Mistake(
            f"{folder}: its weights are stored as {form}, which is not read here; "
            f"name a checkpoint in the format of {', '.join(FORMATS)}"
            + (" (AWQ also rescales what its layers read)" if form == "awq" else "")
        )
    stored = quantization(config) or {}
    odd = None
    if stored.get("desc_act"):
        odd = "columns in another order (desc_act)"
    elif form == "gptq" and stored.get("checkpoint_format", "gptq") != "gptq":
        odd = f"layers in another format of GPTQ ({stored['checkpoint_format']})"
    elif form == COMPRESSED_TENSORS:
        sparse = (stored.get("sparsity_config") or {}).get("format", "dense")
        groups = stored.get("config_groups") or {}
        packed = {stored.get("format"), *(group.get("format") for group in groups.values())}
        if sparse != "dense" or not groups or any("24" in str(name) for name in packed):
            odd = "sparse weights of an older compressed-tensors"
    if odd:
        raise Mistake(f"{folder}: it holds {odd}, which are not read here; name another checkpoint")
    return form


def _check_activations(checkpoint: BlockStream, folder: Path) -> None:
    """Refuse layers that round their inputs."""
    for name, layer in checkpoint.model.named_modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            raise Mistake(
                f"{folder}: {name} rounds its inputs too, and an adapter repairs weights alone; "
                "name a checkpoint with weights in few bits and activations in 16"
            )


def _shapes(block: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(dense_weight(x).shape) for name, x in linear_layers(block).items()}


def _differences(exact: torch.nn.Module, rounded: torch.nn.Module) -> Iterator[tuple[str, float]]:
    """Each tensor that both blocks hold plainly, and how far it differs, relative to its norm."""
    theirs = dict(rounded.named_parameters())
    weights = {f"{name}.weight" for name in linear_layers(exact)}
    for name, tensor in exact.named_parameters():
        if name in theirs and name not in weights and tensor.shape == theirs[name].shape:
            gap = (tensor.float() - theirs[name].float()).norm()
            yield name, (gap / tensor.float().norm().clamp(min=1e-12)).item()


def _outside(original: BlockStream, checkpoint: BlockStream) -> Iterator[tuple[str, float]]:
    """Likewise for what lies outside the decoder's blocks: embeddings, last norm and head, where
    the checkpoint holds them plainly and in the same shape."""
    for name in sorted(original.outside & checkpoint.outside):
        exact, stored = original.tensor(name), checkpoint.tensor(name)
        if not exact.ndim or exact.shape != stored.shape:
            continue
        gap = size = 0.0
        for one, other in zip(exact.split(ROWS), stored.split(ROWS), strict=True):
            one = one.float()
            gap += (one - other.float()).square().sum().item()
            size += one.square().sum().item()
        yield name, (gap / max(size, 1e-24)) ** 0.5


def check(original: Path, folder: Path, trust_remote_code: bool = False) -> dict[str, float]:
    """Compare every layer of a checkpoint with the original's, block by block, on the CPU.

    Returns:
        Block's name -> relative error of its linear layers' weights, ||W - W'|| / ||W||.

    Raises:
        Mistake: the checkpoint is of another model, in a format that is not read, or computes its
            layers from other inputs than the original does (AWQ and SmoothQuant rescale them): the
            difference of weights is then not the error of the layer.
    """
    form = _check_format(folder, trust_remote_code)
    exact_model = BlockStream(original, "cpu", trust_remote_code=trust_remote_code)
    rounded_model = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    _check_activations(rounded_model, folder)
    another = f"{folder} is no compressed form of the model in {original}"
    if len(exact_model) != len(rounded_model):
        raise Mistake(f"{another}: {len(rounded_model)} blocks for {len(exact_model)}")
    errors = {}
    for index in tqdm(range(len(exact_model)), desc="blocks", unit="block"):
        with exact_model.block(index) as exact, rounded_model.block(index) as rounded:
            where = exact_model.name(index)
            if experts(exact) and form != "auto-round":
                raise Mistake(
                    f"{folder}: existing checkpoints of mixtures of experts are read in the "
                    "format of AutoRound alone; name one of that kind, or compress the model here"
                )
            if _shapes(exact) != _shapes(rounded):
                raise Mistake(f"{another}: the linear layers of {where} are others")
            for name, gap in _differences(exact, rounded):
                if gap > ROUNDING:
                    raise Mistake(
                        f"{folder}: {where}.{name} is not the original's ({gap:.0%} off): layers "
                        "read rescaled inputs, as after AWQ or SmoothQuant, or the model was "
                        "fine-tuned; name a checkpoint that left it as it was, or the model that "
                        "was compressed"
                    )
            approximate = linear_layers(rounded)
            lost = total = 0.0
            for name, layer in linear_layers(exact).items():
                weight = dense_weight(layer).float()
                gap = (weight - dense_weight(approximate[name]).float()).square().sum().item()
                size = weight.square().sum().item()
                if not gap <= LARGEST_ERROR**2 * size:  # NaN too
                    raise Mistake(
                        f"{another}: {where}.{name} is {(gap / size) ** 0.5:.0%} off; is this the "
                        "model and the revision that was compressed?"
                    )
                lost, total = lost + gap, total + size
            errors[where] = (lost / total) ** 0.5
    for name, gap in _outside(exact_model, rounded_model):
        if gap > ROUNDING:
            raise Mistake(
                f"{folder}: {name} is not the original's ({gap:.0%} off): the model was "
                "fine-tuned, or its vocabulary changed; name the model and the revision that was "
                "compressed"
            )
    return errors


def take(folder: Path, out: Path) -> None:
    """Put the checkpoint's files into the folder ``out``, which is made; not hidden ones, such as
    Snakemake's time stamps."""
    for file in sorted(folder.glob("[!.]*")):
        sources.link(file, out / file.name)
