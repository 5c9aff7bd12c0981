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
    AutoConfig,
    AutoModelForCausalLM,
    AutoRoundConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eora.architectures import dense_weight, kept_conversions
from eora.lowrank import attach


def portable_quantization(config) -> AutoRoundConfig | None:
    """How to load a checkpoint's quantized layers anywhere: AutoRound's plain torch kernel."""
    if getattr(config, "quantization_config", None) is None:
        return None
    return AutoRoundConfig(backend="torch")


def forget_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Make transformers take a model whose weights were dequantized for the plain one it now is."""
    model.hf_quantizer = None
    model.is_quantized = False
    del model.quantization_method, model.config.quantization_config
    return model


def _densify(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace packed linear layers by plain ones with the same (dequantized) weights, in place."""
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "qweight"):
            continue
        weight = dense_weight(layer).to(dtype)
        bias = getattr(layer, "bias", None)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    return forget_quantization(model).to(dtype)


def load(
    folder: str | Path,
    adapter: str | Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode and the checkpoint's dtype.

    Packed layers stay packed on CUDA. On a CPU they are dequantized once, as AutoRound's packed
    kernels are many times slower there than plain ones.

    Args:
        folder: original or compressed model, as ``from_pretrained`` takes it.
        adapter: adapter folder of ours, 16-bit (PEFT format) or packed.
        device: cpu, cuda or cuda:N.
        trust_remote_code: run model code that the folder carries.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    packed = getattr(config, "quantization_config", None) is not None
    dense = packed and device == "cpu"
    with kept_conversions(config.model_type):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            quantization_config=portable_quantization(config) if dense else None,
            dtype=config.dtype,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
        )
    if dense:
        model = _densify(model, config.dtype)
    if adapter is not None:
        attach(model, Path(adapter))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer
