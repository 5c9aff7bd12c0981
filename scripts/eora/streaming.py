"""One decoder block at a time: models larger than memory, run or read block by block.

A checkpoint folder becomes a skeleton without weights (meta tensors). A block's weights are read
from the safetensors files when it is entered and dropped when it is left, so memory holds one
block whatever the model's depth.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from eora import architectures
from eora.errors import Mistake
from eora.formats import kernel, quantization, read_config
from eora.manifest import safetensors_header

INDEX = "model.safetensors.index.json"
# Shapes of batches whose arguments are kept: for one of 2,048 tokens 1 MB, or 10 with a mask.
_KEPT_CALLS = 128


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of ``folder`` that holds it.

    Raises:
        Mistake: the folder holds no safetensors weights.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise Mistake(f"{folder}: no *.safetensors in it; make or fetch the model again")
    return found


def _give_back() -> None:
    """Have the C library return freed memory to the system, where it is one that can.

    It keeps what was freed in pieces below 32 MB, and blocks of such pieces leave a little more
    behind each: a small model of many blocks would take twice the memory of one of few.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def compute_dtype(folder: Path, device: str) -> torch.dtype | None:
    """What to run a plain checkpoint in on a device; None leaves its tensors as they are stored.

    On a GPU that is the dtype that its config names, in which it is served: a few tensors, such as
    norms, may be stored in another. CPUs have units for bfloat16 or none at all: else float32.
    """
    if device != "cpu":
        told = json.loads((folder / "config.json").read_text())
        named = told.get("dtype") or told.get("torch_dtype")  # the older key
        return getattr(torch, named) if named else None
    able = torch.cpu.get_capabilities()
    headers = map(safetensors_header, set(weight_files(folder).values()))
    stored = {entry["dtype"] for header in headers for entry in header.values()}
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return None if fast and stored == {"BF16"} else torch.float32


class BlockStream:
    """A causal language model in a safetensors folder, with one decoder block loaded at a time.

    Args:
        folder: what ``from_pretrained`` would load; plain or quantized weights.
        device: where blocks run.
        dtype: dtype that floating-point weights are cast to; None keeps the checkpoint's. Packed
            layers keep theirs, see :func:`eora.architectures.densify`.
        trust_remote_code: run model code that the folder carries.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self._folder, self._files = folder, weight_files(folder)
        self._open: dict[Path, Any] = {}
        self._headers: dict[Path, dict[str, Any]] = {}
        config = read_config(folder, trust_remote_code)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
        architectures.split_experts(self.model)
        quantized = quantization(config) is not None
        if quantized:
            self._quantize_skeleton()
        self.model.eval()
        self.prefix, self.blocks = architectures.decoder_blocks(self.model)
        self._stored = architectures.stored_tensors(self.model, self._files)
        self._stem_loaded = False
        self._called: dict[tuple[int, int], list[dict[str, Any]]] = {}
        if not quantized:  # its original was looked at
            architectures.check_blocks(self.model, self.blocks)

    def _quantize_skeleton(self) -> None:
        """Swap linear layers for the quantized ones of the checkpoint's format (no weights yet)."""
        config = self.model.config
        stored = AutoHfQuantizer.merge_quantization_configs(
            config.quantization_config, kernel(config, portable=True)
        )
        quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(self.device)})
        config.quantization_config = stored
        with torch.device("meta"), architectures.kept_conversions(config.model_type):
            quantizer.preprocess_model(model=self.model)

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        """Full name of block ``index``, for example ``model.layers.7``."""
        return f"{self.prefix}.{index}"

    def _header(self, path: Path) -> dict[str, Any]:
        """A file's header, see :func:`safetensors_header`; read once."""
        if path not in self._headers:
            self._headers[path] = safetensors_header(path)
        return self._headers[path]

    def place(self, name: str) -> tuple[Path, slice]:
        """The file that holds a tensor of the model, and its bytes there.

        Raises:
            Mistake: it is stored as a part of a larger one.
        """
        stored = self._stored[name]
        if stored.part:
            raise Mistake(f"{self._folder}: {name} is stored as a part of {stored.name}")
        path = self._files[stored.name]
        return path, slice(*self._header(path)[stored.name]["data_offsets"])

    @property
    def outside(self) -> set[str]:
        """Names of the stored tensors outside the decoder's blocks."""
        return {name for name in self._stored if not name.startswith(f"{self.prefix}.")}

    def tensor(self, name: str) -> Tensor:
        """A tensor as the files hold it; its pages are read as they are looked at."""
        stored = self._stored[name]
        path = self._files[stored.name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        file = self._open[path]
        if stored.part:
            return file.get_slice(stored.name)[stored.part]
        return file.get_tensor(stored.name)

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        """A stored tensor on the device, in the stream's dtype; as it is stored where transformers
        keeps it in float32, such as what chooses among experts."""
        kept = {
            *(getattr(self.model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()),
        }
        floating = tensor.is_floating_point() and not any(part in name for part in kept)
        return tensor.to(self.device, self.dtype if floating else None)

    def _read_ahead(self, index: int) -> None:
        """Have the system read block ``index`` into its page cache while this one computes.

        The pages are the system's, not this process's: no second block counts as its memory.
        """
        if index >= len(self) or not hasattr(os, "posix_fadvise"):
            return
        mine = f"{self.name(index)}."
        names = {stored.name for name, stored in self._stored.items() if name.startswith(mine)}
        for path in {self._files[name] for name in names}:
            header = self._header(path)
            with path.open("rb") as file:
                for start, end in (header[name]["data_offsets"] for name in names & header.keys()):
                    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def _materialise(self, name: str, module: nn.Module, skip: tuple[str, ...] = ()) -> None:
        """Give the module's meta tensors their values: from the files, or as the model computes."""
        computed = defaultdict(list)
        tensors = list(module.named_parameters()) + list(module.named_buffers())
        tensors = [(local, old) for local, old in tensors if local not in skip]
        for local, old in tensors:
            full = f"{name}.{local}" if name else local
            parent, _, leaf = local.rpartition(".")
            owner = module.get_submodule(parent)
            if full in self._stored:
                value = self.tensor(full)
                packed = architectures.is_packed(owner)
                value = value.to(self.device) if packed else self._cast(value, full)
                if local in dict(module.named_parameters()):
                    parameter = nn.Parameter(value, requires_grad=False)
                    parameter._is_hf_initialized = True  # _init_weights below leaves it alone
                    owner.register_parameter(leaf, parameter)
                else:
                    owner.register_buffer(leaf, value)
            elif old.is_meta:
                computed[parent].append(leaf)
        for parent, leaves in computed.items():
            owner = module.get_submodule(parent)
            persistent = set(owner.state_dict()) & set(leaves)
            if persistent:
                missing = ", ".join(f"{name}.{parent}.{leaf}" for leaf in sorted(persistent))
                raise Mistake(
                    f"{self._folder}: the weights lack {missing}, which config.json calls for; "
                    "fetch the model again, or mend its config.json"
                )
            for leaf in leaves:  # rotary frequencies and the like: never stored, always computed
                old = owner._buffers[leaf]
                owner._buffers[leaf] = torch.empty_like(old, device=self.device)
            self.model._init_weights(owner)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights on the device; they are dropped on leaving."""
        block = self.blocks[index]
        self._materialise(self.name(index), block)
        self._open.clear()
        self._read_ahead(index + 1)
        try:
            yield block
        finally:
            block.to("meta")
            _give_back()

    @cached_property
    def _embedding(self) -> str:
        """Full name of the token embedding."""
        wanted = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def _load_stem(self) -> None:
        """Load what stands outside the blocks and before the head: rotary, norms, positions.

        All but the token embedding, which may be larger than a block: see :meth:`embed`.
        """
        for name, module in self.model.base_model.named_modules():
            full = f"{self.model.base_model_prefix}.{name}" if name else ""
            if not full or full == self.prefix or full.startswith(f"{self.prefix}."):
                continue
            if not any(True for _ in module.children()):
                self._materialise(full, module, skip=("weight",) if full == self._embedding else ())
        # It only matters to gradients, and need not be among the rows that are looked up.
        self.model.get_input_embeddings().padding_idx = None
        self._stem_loaded = True

    @torch.inference_mode()
    def _enter(self, input_ids: Tensor) -> list[architectures.Recorder]:
        """Call the model with recorders in its blocks' places.

        Only the embedding's rows that are looked up are read.
        """
        if not self._stem_loaded:
            self._load_stem()
        wanted, positions = input_ids.unique(return_inverse=True)
        embedding = self.model.get_submodule(self._embedding)
        table = embedding.weight
        table_name = f"{self._embedding}.weight"
        rows = self._cast(self.tensor(table_name)[wanted], table_name)
        self._open.clear()
        recorders = [architectures.Recorder(block) for block in self.blocks]
        recorders[-1].last = True
        parent_name, _, leaf = self.prefix.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        setattr(parent, leaf, nn.ModuleList(recorders))
        try:
            self.model.base_model(input_ids=positions.to(self.device), use_cache=False)
        except architectures.LastBlock:
            pass
        except Exception as error:
            architectures.explain(self.model, recorders, error)
            raise
        finally:
            setattr(parent, leaf, self.blocks)
            embedding.weight = table
        architectures.check_calls(self.model, recorders)
        return recorders

    def embed(self, input_ids: Tensor) -> Tensor:
        """The first block's input (batch, seq, hidden) for ``input_ids`` (batch, seq) int64."""
        return self._enter(input_ids)[0].hidden

    def calls(self, batch: int, seq: int) -> list[dict[str, Any]]:
        """Each block's keyword arguments for ``batch`` samples of ``seq`` tokens, unmasked.

        Masks and position embeddings depend neither on the tokens nor on what earlier blocks
        computed.
        """
        if (batch, seq) in self._called:
            return self._called[batch, seq]
        recorders = self._enter(torch.zeros(batch, seq, dtype=torch.int64))
        found = [recorder.kwargs for recorder in recorders]
        # Shapes come in turn, block after block: of too many, the first that came are worth most.
        if len(self._called) < _KEPT_CALLS:
            self._called[batch, seq] = found
        return found


def check(folder: Path, trust_remote_code: bool = False) -> BlockStream:
    """Refuse a model that cannot be run block by block, or that has layers of an unknown kind.

    Its embeddings are read and no block is: this takes seconds, whatever the model's size.

    Returns:
        The model, for what else is to be checked of it.

    Raises:
        Mistake: naming the model's kind and what is not supported about it.
    """
    stream = BlockStream(folder, "cpu", trust_remote_code=trust_remote_code)
    try:
        stream.calls(1, 2)
    except NotImplementedError as error:  # of meta tensors that are neither stored nor buffers
        raise architectures.unsupported(
            stream.model, f"it cannot be called without its blocks ({error})"
        ) from error
    return stream
