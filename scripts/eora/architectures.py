"""What differs between families of models: blocks, linear layers, experts, names in the files.

The rest of the library sees decoder blocks of linear layers with an (out, in) weight each. A family
needs no entry of its own here: what a model is, is told by its modules, and what fits none of the
shapes below is refused by name. Tests compare tiny models of many families with transformers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations import moe
from transformers.pytorch_utils import Conv1D

from eora.errors import Mistake

# --- blocks and their linear layers ---


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder blocks: its ModuleList with one entry a hidden layer.

    Raises:
        Mistake: no such list, so the architecture is not supported.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise unsupported(model, f"no list of {depth} decoder blocks is found in it")


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Local name -> layer, for every layer of a block that is quantized and adapted, in order.

    These are linear layers, transformers' ``Conv1D`` (the same with its weight transposed), and
    quantized ones (see :func:`is_packed`). Routers of experts are none of them, nor are gates of
    one output: they are left as they are.
    """
    routers = _routers(block)
    return {
        name: module
        for name, module in block.named_modules()
        if is_packed(module)
        or (
            isinstance(module, nn.Linear | Conv1D)
            and len(dense_weight(module)) > 1
            and not f"{name}.".startswith(routers)
        )
    }


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer holds packed weights in place of ``weight``: AutoRound's and GPTQ's
    ``qweight``, or what compressed-tensors put there."""
    return hasattr(layer, "qweight") or _is_compressed(layer)


def _is_compressed(layer: nn.Module) -> bool:
    return getattr(layer, "quantization_status", None) == QuantizationStatus.COMPRESSED


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight (out, in), dequantized by its format's own library where it is packed.

    That is compressed-tensors' decompression, or the layer's forward of the identity, which is
    exact: every output is one dequantized weight plus zeros.
    """
    if _is_compressed(layer):
        scheme = layer.quantization_scheme
        compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
        return compressor.decompress(get_direct_state_dict(layer), scheme)["weight"].detach()
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if isinstance(layer, Conv1D):
        return layer.weight.detach().T
    eye = torch.eye(layer.infeatures, dtype=torch.float32, device=layer.qweight.device)
    bias, layer.bias = layer.bias, None
    try:
        with torch.inference_mode():
            return layer(eye).T
    finally:
        layer.bias = bias


def densify(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace packed linear layers by plain ones with the same (dequantized) weights, in place."""
    # By name: a list of the layers would keep the packed ones beside the dense until the end.
    for name in [name for name, layer in model.named_modules() if is_packed(layer)]:
        layer = model.get_submodule(name)
        dense = _linear(dense_weight(layer).to(dtype).contiguous())
        if (bias := getattr(layer, "bias", None)) is not None:
            dense.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        model.set_submodule(name, dense)


# --- mixture of experts ---


class Expert(nn.Module):
    """One expert's three layers, without biases; their weights are views of the fused ones."""

    def __init__(self, gate_up: Tensor, down: Tensor):
        """gate_up (2 I, H), the gate's rows first; down (H, I)."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


class Experts(nn.Module):
    """transformers' fused experts (3-D weights) as so many modules of plain linear layers.

    The layers are called as AutoRound calls them: ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``.

    Attributes:
        real: (tokens,) bool, or None. Where it is given, the other tokens (padding) are routed to
            no expert and get zeros.
        routing: while an expert runs, the routing weights (tokens of it,) of what it is given.
    """

    def __init__(self, fused: nn.Module):
        """fused: a module that :func:`_is_known` takes, with weights or without (meta)."""
        super().__init__()
        self.act_fn = fused.act_fn
        self.real: Tensor | None = None
        self.routing: Tensor | None = None
        self.size = len(fused.down_proj)
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        for i, (gate_up, down) in enumerate(pairs):
            self.add_module(str(i), Expert(gate_up, down))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, H), top_k_index and top_k_weights (tokens, k) -> (tokens, H)."""
        total = torch.zeros_like(hidden_states)
        taken = top_k_index
        if self.real is not None:
            taken = taken.masked_fill(~self.real.to(taken.device)[:, None], self.size)
        for i in taken.unique().tolist():
            if i == self.size:
                continue
            tokens, place = torch.where(taken == i)
            self.routing = top_k_weights[tokens, place]
            expert, x = self.get_submodule(str(i)), hidden_states[tokens]
            y = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
            total.index_add_(0, tokens, (y * self.routing[:, None]).to(total.dtype))
        self.routing = None
        return total


def _is_known(fused: nn.Module) -> bool:
    """Whether fused experts are laid out and computed as :class:`Experts` does.

    transformers' experts say so themselves: their decorator, by which AutoRound and the grouped
    kernels know them too, records the layout.
    """
    return (
        getattr(fused, "has_gate", False)
        and fused.is_concatenated
        and not fused.is_transposed
        and not fused.has_bias
        and type(fused)._apply_gate is moe._default_apply_gate
        and hasattr(fused, "act_fn")
        and {name for name, _ in fused.named_parameters()} == {"gate_up_proj", "down_proj"}
    )


def split_experts(model: PreTrainedModel) -> None:
    """Put :class:`Experts` in the place of all fused experts, with their weights, in place.

    Raises:
        Mistake: fused weights of another layout.
    """
    for name, module in list(model.named_modules()):
        own = module.named_parameters(recurse=False)
        fused = [n for n, tensor in own if tensor.ndim == 3 and 1 not in tensor.shape]
        if _is_known(module):
            model.set_submodule(name, Experts(module))
        elif fused and not isinstance(module, nn.Conv1d):
            raise unsupported(model, f"{name}.{fused[0]} holds experts of an unknown layout")


def experts(block: nn.Module) -> dict[str, Experts]:
    """Local name -> the experts of a block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}


def _routers(block: nn.Module) -> tuple[str, ...]:
    """Prefixes of what chooses a token's experts: a ``gate`` or ``router`` beside them."""
    return tuple(
        f"{name.removesuffix('experts')}{router}."
        for name in experts(block)
        for router in ("gate", "router")
    )


# --- names of weights ---


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the model is found: a tensor in the files, or a part of it."""

    name: str
    part: tuple[int | slice, ...] = ()


# Mixtral's names for an expert's layers, in its first checkpoints.
_OLD_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OLD = re.compile(r"(?<=\.experts\.)(\d+)\.(w[123])(?=\.)")


def stored_tensors(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Stored]:
    """Name in the model -> where its tensor is, for all tensors of a checkpoint.

    Checkpoints may name tensors otherwise than the model does, as transformers' tables say; leave
    out the base model's prefix; and hold experts one by one or fused.

    Args:
        model: after :func:`split_experts`.
        names: of the checkpoint's tensors.
    """
    renamings = [
        conversion
        for conversion in get_model_conversion_mapping(model)
        if not isinstance(conversion, WeightConverter)
    ]
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    found: dict[str, Stored] = {}
    for stored in names:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        name = _OLD.sub(lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}", name)
        if name not in known and not name.startswith(prefix):
            name = prefix + name
        found[name] = Stored(stored)
    for name, module in experts(model).items():
        gate_up, down = found.get(f"{name}.gate_up_proj"), found.get(f"{name}.down_proj")
        if gate_up is None or down is None:
            continue  # they are stored one by one
        for i in range(module.size):
            width = module.get_submodule(f"{i}.gate_proj").out_features
            for leaf, part in (("gate", slice(width)), ("up", slice(width, None))):
                found[f"{name}.{i}.{leaf}_proj.weight"] = Stored(gate_up.name, (i, part))
            found[f"{name}.{i}.down_proj.weight"] = Stored(down.name, (i,))
    return found


@contextmanager
def kept_conversions(model_type: str) -> Iterator[None]:
    """Undo what loading a quantized model does to transformers' table of weight conversions.

    AutoRound drops a family's conversions for the whole process, after which a plain checkpoint of
    the same family would be read wrongly.
    """
    before = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    try:
        yield
    finally:
        if before is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(
                model_type, before, overwrite=True
            )


# --- how blocks are called, and what is refused ---


class LastBlock(Exception):
    """The last block was called: what follows is not needed."""


class Recorder(nn.Module):
    """Stands in for a block: remembers how the model calls it and passes hidden states on.

    The ``last`` one ends the call by raising :class:`LastBlock`.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        object.__setattr__(self, "block", block)  # not as a submodule: its weights are not ours
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        self.last = False

    def __getattr__(self, name: str) -> Any:
        """Models ask a block for such things before calling it (sliding or full attention)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = list(inspect.signature(self.block.forward).parameters)[1:]
        self.hidden = hidden_states
        self.kwargs = dict(zip(names, args, strict=False)) | kwargs
        if self.last:
            raise LastBlock
        return hidden_states


def unsupported(model: PreTrainedModel, why: str) -> Mistake:
    """What to raise for a model that cannot be run block by block."""
    return Mistake(
        f"{type(model).__name__} ({model.config.model_type}) is not supported: {why}; "
        "name another model"
    )


# No list of families decides what is supported: such a list would refuse the many that are like
# those in it. The checks below were tried with tiny random models of most of transformers' causal
# families: whatever passed them gave, block by block, the whole model's hidden states.


def check_blocks(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Refuse encoders, and matrices that are no linear layers: convolutions, states, embeddings.

    Nothing would be compressed or adapted there, and what such a block does beside its linear
    layers (a state that is carried along, say) is nothing that is known here.

    Raises:
        Mistake: naming the first such tensor.
    """
    fills_in = type(model.config) in AutoModelForMaskedLM._model_mapping
    if (
        fills_in
        and not getattr(model.config, "is_decoder", True)
        or not all(getattr(module, "is_causal", True) for module in blocks.modules())
    ):
        raise unsupported(model, "its tokens see those after them, as in an encoder")
    for i, block in enumerate(blocks):
        routers = _routers(block)
        layers = {name for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        for name, tensor in block.named_parameters():
            owner = name.rpartition(".")[0]
            if tensor.ndim > 1 and owner not in layers and not name.startswith(routers):
                raise unsupported(
                    model,
                    f"block {i} holds {name} of shape {tuple(tensor.shape)}, which is no linear "
                    "layer (attention and feed-forward layers alone are known)",
                )


def explain(model: PreTrainedModel, recorders: list[Recorder], error: Exception) -> None:
    """Say what it means that the model failed on what a recorder returned.

    Raises:
        Mistake: it failed between two blocks.
    """
    if recorders[0].hidden is not None and recorders[-1].hidden is None:
        raise unsupported(model, f"its blocks return more than hidden states ({error})") from error


def check_calls(model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """Refuse models whose blocks pass on more than one tensor of hidden states.

    Blocks are run one by one, each on what the one before returned: that is right only where the
    model itself does nothing between them and hands them nothing that they fill in.

    Args:
        recorders: one a block, after the model was called.

    Raises:
        Mistake: saying what else is passed.
    """
    first = recorders[0].hidden
    if first is None or first.ndim != 3:
        raise unsupported(model, "its blocks do not take hidden states (batch, seq, width)")
    for i, recorder in enumerate(recorders):
        if recorder.hidden is not first:
            raise unsupported(
                model, f"block {i} does not take the hidden states as block {i - 1} returns them"
            )
        for name, value in recorder.kwargs.items():
            if not _is_plain(value):
                raise unsupported(
                    model, f"its blocks share {name} ({type(value).__name__}) beside hidden states"
                )


def _is_plain(value: Any) -> bool:
    """Whether an argument is of a kind that a block can read and cannot fill in."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
