"""Original, compressed and compensated models, ready to run.

Paths are those of the workflow's results, for example::

    base = "results/compressed/m/w2g32/model"
    model, tokenizer = load(base, adapter="results/adapters/m/w2g32/eora/r64-4bit/adapter")
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from eora.architectures import dense_weight, densify, kept_conversions
from eora.errors import Mistake
from eora.formats import COMPRESSED_TENSORS, kernel, quantization_format, read_config
from eora.lowrank import attach, beside


def forget_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Make transformers take a model whose weights were dequantized for the plain one it now is."""
    model.hf_quantizer = None
    model.is_quantized = False
    del model.quantization_method, model.config.quantization_config
    return model


def evaluation_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """What a checkpoint of this dtype is run in: its own, but float32 for float16 on a CPU, which
    has no units for it and takes many times as long."""
    return torch.float32 if device == "cpu" and stored == torch.float16 else stored


def load_original(
    folder: Path, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to be compressed, on the CPU in the dtype that it is stored in, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load(
    folder: str | Path,
    adapter: str | Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode, in :func:`evaluation_dtype`.

    Packed layers stay packed on CUDA, but for those of compressed-tensors, which has no kernels for
    plain transformers. On a CPU all are dequantized once, as AutoRound's packed kernels are many
    times slower there than plain ones.

    Args:
        folder: original or compressed model, as ``from_pretrained`` takes it.
        adapter: adapter folder of ours, 16-bit (PEFT format) or packed.
        device: cpu, cuda or cuda:N.
        trust_remote_code: run model code that the folder carries.
    """
    folder = Path(folder)
    config = read_config(folder, trust_remote_code)
    stored = quantization_format(config)
    packed = stored is not None
    dense = packed and (device == "cpu" or stored == COMPRESSED_TENSORS)
    dtype = evaluation_dtype(config.dtype, device)
    with kept_conversions(config.model_type):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            quantization_config=kernel(config, portable=dense),
            dtype=config.dtype if packed else dtype,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
        )
    if dense:
        densify(model, dtype)
        model = forget_quantization(model).to(dtype)
    if adapter is not None:
        attach(model, Path(adapter))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


def merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Add an adapter's products to the weights of a model's layers, in place.

    The sum is taken in float32, of factors as they are stored, and rounded to the layer's dtype.

    Args:
        model: loaded on a CPU, so that its layers are dense.
        adapter: adapter folder of ours, 16-bit (PEFT format) or packed.

    Raises:
        Mistake: the architecture has no layer of that name; loading a quantized mixture of experts
            takes its fused weights apart, and nothing puts them together again.
    """
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, layer, factors in beside(model, adapter):
        try:
            target = plain.get_submodule(name)
        except AttributeError:
            raise Mistake(
                f"{name} is a part of fused experts in {type(model).__name__}: such models cannot "
                "be merged; export the adapter by itself"
            ) from None
        a, b = factors.matrices(torch.float32)
        weight = dense_weight(layer)
        weight = (weight.float() + b @ a).to(weight.dtype)
        if isinstance(target, Conv1D):  # (in, out)
            weight = weight.T
        target.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        target.bias = layer.bias
        model.set_submodule(name, target)
    return model
