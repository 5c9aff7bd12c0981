"""Checkpoints that somebody else compressed: taken over as they are, after a look at each layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from eora import found_scales, sources
from eora.architectures import dense_weight, experts, linear_layers
from eora.errors import Mistake
from eora.formats import COMPRESSED_TENSORS, quantization, quantization_format, read_config
from eora.smoothing import Scales
from eora.streaming import BlockStream

AWQ = "awq"
FORMATS = ("auto-round", "gptq", AWQ, COMPRESSED_TENSORS)
# Norms and biases are stored in 16 bits on both sides at worst: that far they may differ; and that
# far, where a bias is divided by scales that rounded weights told.
ROUNDING, TOLD = 0.01, 0.05
# Of the weights' norm: 2-bit rounding costs up to a half of it, another model's weights 1.4.
LARGEST_ERROR = 0.9
# In a block that is rescaled: how much further a layer's weights may be off by the scales that were
# told than by the best ones. If more, something reads rescaled inputs that nothing tells of.
UNTOLD = 1.5
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
        )
    stored = quantization(config) or {}
    odd = None
    if stored.get("desc_act"):
        odd = "columns in another order (desc_act)"
    elif form == "gptq" and stored.get("checkpoint_format", "gptq") != "gptq":
        odd = f"layers in another format of GPTQ ({stored['checkpoint_format']})"
    elif form == AWQ:
        version, bits = stored.get("version", "gemm"), stored.get("bits", 4)
        if (version, bits) != ("gemm", 4):
            odd = f"layers in another format of AWQ ({version}, {bits} bits)"
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


@dataclass(frozen=True)
class _Block:
    """A block of the original beside the checkpoint's, by local names.

    Attributes:
        scales: layers that read or write rescaled values.
        errors: layer -> squares of its weights' error, and of its weights.
        norms: how far norms, biases and the like differ from what they should be, relative to
            their norm; and how far they may.
        untold: layers that are rescaled in a way that nothing explains.
    """

    scales: dict[str, Scales]
    errors: dict[str, tuple[float, float]]
    norms: dict[str, tuple[float, float]]
    untold: list[str]


def _off(exact: Tensor, stored: Tensor) -> float:
    """How far a tensor differs from what it should be, relative to that one's norm."""
    exact, stored = exact.float(), stored.float()
    return ((exact - stored).norm() / exact.norm().clamp(min=1e-12)).item()


def _dense(block: nn.Module) -> dict[str, Tensor]:
    """Linear layer -> its weight (out, in) in float32."""
    return {name: dense_weight(layer).float() for name, layer in linear_layers(block).items()}


def _plain(
    exact: nn.Module, rounded: nn.Module, weights: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors that both blocks hold plainly, but for linear layers' weights: norms and biases."""
    theirs = {**dict(rounded.named_parameters()), **dict(rounded.named_buffers())}
    return {
        name: (tensor.detach(), theirs[name].detach())
        for name, tensor in exact.named_parameters()
        if name.removesuffix(".weight") not in weights
        and name in theirs
        and tensor.shape == theirs[name].shape
    }


def _compare(
    exact: nn.Module,
    rounded: nn.Module,
    weights: dict[str, Tensor],
    theirs: dict[str, Tensor],
) -> _Block:
    """Compare a block of the original with the checkpoint's.

    Args:
        exact, rounded: the block in both.
        weights, theirs: the same layers in both -> their weights, of the same shapes, see `_dense`.
    """
    plain = _plain(exact, rounded, weights)
    # Mixtures of experts are read in a format alone that rescales nothing.
    rescalable = {} if experts(exact) else weights
    fits = {name: found_scales.fit(weight, theirs[name]) for name, weight in rescalable.items()}
    norms = {
        name: pair
        for name, pair in plain.items()
        if name.rpartition(".")[0] not in weights and _off(*pair) > ROUNDING
    }
    scales, told = found_scales.explain(fits, norms)
    errors, untold = {}, []
    for name, weight in weights.items():
        by = scales.get(name)
        wanted = weight if by is None else weight * by.input / by.output[:, None]
        gap = (wanted - theirs[name]).square().sum().item()
        errors[name] = gap, wanted.square().sum().item()
        if told:
            best = weight * (fits[name].input.logs - fits[name].output.logs[:, None]).exp()
            if gap > UNTOLD**2 * (best - theirs[name]).square().sum().item():
                untold.append(name)
    differ = {}
    for name, (before, after) in plain.items():
        owner, _, leaf = name.rpartition(".")
        if name in told:
            continue
        if leaf == "bias" and owner in scales:
            differ[name] = _off(before / scales[owner].output, after), TOLD
        elif leaf == "bias" and f"{owner}.weight" in told:
            differ[name] = _off(before / told[f"{owner}.weight"], after), TOLD
        else:
            differ[name] = _off(before, after), ROUNDING
    return _Block(scales, errors, differ, untold)


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


def check(
    original: Path, folder: Path, trust_remote_code: bool = False, source: Path | None = None
) -> tuple[dict[str, float], dict[str, Scales]]:
    """Compare every layer of a checkpoint with the original's, block by block, on the CPU.

    Args:
        original: the model that was compressed.
        folder: the checkpoint, as :func:`take` made it.
        trust_remote_code: run model code that the folders carry.
        source: where it came from, for messages.

    Returns:
        Block's name -> relative error of its linear layers' weights, ||W - W'|| / ||W||; and the
        full names of layers that read or write rescaled values, as after AWQ -> their scales.

    Raises:
        Mistake: the checkpoint is of another model, or computes its layers from other inputs than
            the original does and nothing tells by which scales: the difference of weights is then
            not the error of the layer.
    """
    form = quantization_format(read_config(folder, trust_remote_code))
    exact_model = BlockStream(original, "cpu", trust_remote_code=trust_remote_code)
    rounded_model = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    folder = source or folder
    _check_activations(rounded_model, folder)
    another = f"{folder} is no compressed form of the model in {original}"
    if len(exact_model) != len(rounded_model):
        raise Mistake(f"{another}: {len(rounded_model)} blocks for {len(exact_model)}")
    errors, scales = {}, {}
    for index in tqdm(range(len(exact_model)), desc="blocks", unit="block"):
        with exact_model.block(index) as exact, rounded_model.block(index) as rounded:
            where = exact_model.name(index)
            if experts(exact) and form != "auto-round":
                raise Mistake(
                    f"{folder}: existing checkpoints of mixtures of experts are read in the "
                    "format of AutoRound alone; name one of that kind, or compress the model here"
                )
            weights, theirs = _dense(exact), _dense(rounded)
            shapes = ({name: w.shape for name, w in some.items()} for some in (weights, theirs))
            if next(shapes) != next(shapes):
                raise Mistake(f"{another}: the linear layers of {where} are others")
            found = _compare(exact, rounded, weights, theirs)
        for name, (gap, most) in found.norms.items():
            if not gap <= most:  # NaN too
                raise Mistake(
                    f"{folder}: {where}.{name} is not the original's ({gap:.0%} off), nor divided "
                    "by scales that the layers after it were multiplied with, as AWQ does; the "
                    "model was fine-tuned: name a checkpoint that left it as it was, or the model "
                    "that was compressed"
                )
        for name, (gap, size) in found.errors.items():
            if not gap <= LARGEST_ERROR**2 * size:
                raise Mistake(
                    f"{another}: {where}.{name} is {(gap / size) ** 0.5:.0%} off; is this the "
                    "model and the revision that was compressed?"
                )
        if found.untold:
            raise Mistake(
                f"{folder}: {where}.{found.untold[0]} reads or writes values that are rescaled, "
                "and neither a norm nor another layer tells by how much; compress the model here, "
                "by awq for example"
            )
        lost, total = map(sum, zip(*found.errors.values(), strict=True))
        errors[where] = (lost / total) ** 0.5
        scales |= {f"{where}.{name}": some for name, some in found.scales.items()}
    for name, gap in _outside(exact_model, rounded_model):
        if gap > ROUNDING:
            raise Mistake(
                f"{folder}: {name} is not the original's ({gap:.0%} off): the model was "
                "fine-tuned, or its vocabulary changed; name the model and the revision that was "
                "compressed"
            )
    return errors, scales


def take(folder: Path, out: Path, trust_remote_code: bool = False) -> None:
    """Put the checkpoint's files into the folder ``out``, which is made; not hidden ones, such as
    Snakemake's time stamps. AutoAWQ's format becomes compressed-tensors', with the same integers.

    Raises:
        Mistake: the format, or a part of it, is not read.
    """
    form = _check_format(folder, trust_remote_code)
    if form == AWQ:
        _convert(folder, out)
        return
    for file in sorted(folder.glob("[!.]*")):
        sources.link(file, out / file.name)


def _convert(folder: Path, out: Path) -> None:
    """Write a checkpoint in AutoAWQ's format in that of compressed-tensors, which knows both."""
    from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint

    converter = AutoAWQConverter.from_pretrained(str(folder))
    convert_checkpoint(folder, out, converter, device="cpu")
    for hidden in out.glob(".*"):
        hidden.unlink()
