"""How checkpoints store quantized layers, and which library reads them on which device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoRoundConfig, PretrainedConfig

COMPRESSED_TENSORS = "compressed-tensors"


def quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a model's config says of its quantized layers; None: it has none."""
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()


def quantization_format(config: PretrainedConfig) -> str | None:
    """What a checkpoint's quantized layers are stored in, such as ``gptq``; None: it has none."""
    stored = quantization(config)
    if stored is None:
        return None
    return str(getattr(stored["quant_method"], "value", stored["quant_method"]))


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """A checkpoint's config, such that :func:`kernel` loads its layers.

    GPTQModel notes in ``meta`` how it quantized. transformers takes the key for a sign of its
    second format, and refuses it; which format it is stands in ``checkpoint_format``.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if quantization_format(config) == "gptq":
        config.quantization_config = {
            key: value for key, value in quantization(config).items() if key != "meta"
        }
    return config


def kernel(config: PretrainedConfig, portable: bool) -> AutoRoundConfig | None:
    """What reads a checkpoint's quantized layers: ``quantization_config`` for ``from_pretrained``.

    AutoRound reads its own format and GPTQ's, for which transformers would want two more packages.

    Args:
        config: the checkpoint's, see :func:`read_config`.
        portable: AutoRound's plain torch layers, which run anywhere and can be unpacked; otherwise
            the fastest of its kernels that the device has.

    Returns:
        None where there is nothing to choose: compressed-tensors unpacks its own layers.
    """
    if quantization_format(config) in (None, COMPRESSED_TENSORS):
        return None
    return AutoRoundConfig(backend="torch" if portable else "auto")
