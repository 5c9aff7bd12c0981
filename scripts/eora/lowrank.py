"""The low-rank runtime: an adapter beside any linear layer, plain or quantized.

PEFT refuses AutoRound's packed layers; this module only calls the layer it wraps, so any will do.
Low-bit factors stay packed in memory and are unpacked for the one layer that is running.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from eora import adapters, packing
from eora.errors import Mistake


class Factors(nn.Module):
    """A (r, in) and B (out, r)."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor):
        super().__init__()
        self.register_buffer("lora_A", lora_A)
        self.register_buffer("lora_B", lora_B)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in ``dtype``."""
        return self.lora_A.to(dtype), self.lora_B.to(dtype)


class PackedFactors(nn.Module):
    """Low-bit A and B^T, packed in memory as on disk (see :mod:`eora.packing`)."""

    def __init__(self, bits: int, group_size: int, sides: dict[str, dict[str, Tensor]]):
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.shapes = {
            side: tuple(packed["weight_shape"].tolist()) for side, packed in sides.items()
        }
        for side, packed in sides.items():
            for name in ("weight_packed", "weight_scale"):
                self.register_buffer(f"{side}_{name}", packed[name])

    def _side(self, side: str, dtype: torch.dtype) -> Tensor:
        packed = {
            name: getattr(self, f"{side}_{name}") for name in ("weight_packed", "weight_scale")
        }
        packed["weight_shape"] = self.shapes[side]
        return packing.unpack(packed, self.bits, self.group_size, dtype)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), unpacked into ``dtype``."""
        return self._side("lora_A", dtype), self._side("lora_B_T", dtype).T


class LowRankLinear(nn.Module):
    """``y = base(x) + x A^T B^T``: a linear layer with a low-rank side path."""

    def __init__(self, base: nn.Module, factors: Factors | PackedFactors):
        super().__init__()
        self.base, self.factors = base, factors

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        a, b = self.factors.matrices(x.dtype)
        return self.base(x) + (x @ a.T) @ b.T


def load_factors(folder: Path) -> dict[str, Factors | PackedFactors]:
    """Layer name -> factors of an adapter folder, 16-bit or packed, whichever it holds."""
    if (folder / packing.WEIGHTS).is_file():
        bits, group_size, layers = packing.load(folder)
        return {layer: PackedFactors(bits, group_size, sides) for layer, sides in layers.items()}
    return {layer: Factors(a, b) for layer, (a, b) in adapters.load_peft(folder).items()}


def beside(
    model: nn.Module, folder: Path
) -> Iterator[tuple[str, nn.Module, Factors | PackedFactors]]:
    """Layer name, the model's layer and its factors, for every layer of an adapter folder.

    Raises:
        Mistake: the adapter names a layer that the model does not have.
    """
    for name, factors in load_factors(folder).items():
        try:
            yield name, model.get_submodule(name), factors
        except AttributeError:
            raise Mistake(
                f"{folder} is for another model, as this one has no layer {name}; "
                "name the adapter's own"
            ) from None


def attach(model: nn.Module, folder: Path) -> nn.Module:
    """Put an adapter folder beside the model's layers, in place; factors, or their scales, in the
    dtype that the model computes in.

    Raises:
        Mistake: the adapter names a layer that the model does not have.
    """
    for name, layer, factors in beside(model, folder):
        tensor = next((t for t in (*layer.parameters(), *layer.buffers())), None)
        device = "cpu" if tensor is None else tensor.device
        model.set_submodule(name, LowRankLinear(layer, factors.to(device, model.dtype)))
    return model
