"""What a config costs, told before it runs: memory, disk, work and hours of each job.

Everything follows from the shapes of a model's layers and the config. Memory is a sum of named
terms for each phase of a job, and the job needs what its largest phase does. Hours are counted
operations over a card's stated rates times a stated efficiency.

Needs no torch: the rules size their jobs with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from eora.config import ONE_SHOT, ORIGINAL, Config, Variant, integers, is_gguf, variants
from eora.shapes import Block, Layer, Shapes
from eora.stages import Place, asked

GB = 1e9

# --- Costs: terms of memory, files, operations. ---


@dataclass(frozen=True)
class Term:
    """Part of what a phase holds in memory, and the setting that makes it smaller, if any."""

    name: str
    bytes: float
    setting: str = ""


Phase = tuple[Term, ...]
Memory = tuple[Phase, ...]  # phases that follow each other; what one holds, the next has let go of


def peak(memory: Memory) -> Phase:
    """The phase that holds most."""
    return max(memory, key=total, default=())


def total(phase: Phase) -> float:
    """Its bytes."""
    return sum(term.bytes for term in phase)


@dataclass(frozen=True)
class Cost:
    """What one job takes.

    Attributes:
        device: memory of the GPU; empty where none is used.
        host: memory of the machine.
        disk: bytes of its result.
        passing: bytes of its result that are deleted once the next job has read them.
        work: kind of work -> floating-point operations (memory, disk: bytes), see :class:`Card`.
    """

    device: Memory
    host: Memory
    disk: float
    work: dict[str, float] = field(default_factory=dict)
    passing: float = 0.0

    @property
    def operations(self) -> float:
        return sum(amount for kind, amount in self.work.items() if kind not in ("memory", "disk"))


# Python with what a stage imports, in memory before it does anything. Measured, with this
# project's locked versions.
IMPORTS = {
    "covariance": 0.525,
    "decompose": 0.54,
    "compress": 0.58,
    "evaluate": 0.56,
    "adapter": 0.52,
    "tune_adapter": 0.75,
}
# On a GPU, what CUDA holds before the first tensor: its context and the libraries' workspaces on
# the device; its libraries and page tables on the host. Common figures, not measured here.
CUDA_DEVICE, CUDA_HOST = 0.8, 3.0
# Bytes that AutoRound holds for each weight of the block that it tunes, beside the weights: the
# rounding value, its gradient and its best copy (4 each), and what autograd keeps of rounding and
# clamping. Measured on a CPU; AutoRound's own estimate was 13 for each byte of 16-bit weights, 26.
TUNED = 36
# Bytes that autograd keeps for each value that a layer gives. Measured likewise.
KEPT = 10
# What a task of lm-eval is taken to ask where no limit is set, and how many tokens a question has
# with its answers. Tasks that write text take longer.
QUESTIONS, QUESTION_TOKENS = 1_000, 1_000
# And how many tokens a text has that is judged whole: WikiText-2's test split has 290,000.
TEXT = 300_000


def triangle(width: int) -> float:
    """Share of a (width, width) matrix that its lower triangle takes in blocks of rows."""
    blocks = min(16, math.ceil(width / 192))
    return (1 + 1 / blocks) / 2


# The stages whose jobs grow with the model.
SIZED = (
    "download_model",
    "compress",
    "covariance",
    "compressed_covariance",
    "decompose",
    "adapter",
    "quantize_adapter",
    "tune_adapter",
    "evaluate",
)


# Of them, those that no GPU helps: they read, slice, and take thousands of small steps, which one
# thread does faster than several.
ONE_THREAD = ("download_model", "adapter", "quantize_adapter")


class Costs:
    """What each job of a config costs on a kind of machine.

    Args:
        config: the checked config.
        cuda: whether GPU jobs have a GPU, or run on the CPU.
    """

    def __init__(self, config: Config, cuda: bool):
        self.config, self.cuda = config, cuda
        self.variants = {(v.model, v.name): v for v in variants(config)}

    def of(self, place: Place, model: Shapes) -> Cost:
        """The cost of the job that makes this result.

        Args:
            place: the result, of one of the stages in :data:`SIZED`.
            model: the model's shapes.
        """
        names: dict[str, Any] = dict(place.wildcards)
        name = names.pop("model")
        if place.stage == "download_model":
            names["gguf"] = is_gguf(self.config["models"][name])
        if "variant" in names:
            names["variant"] = self.variants[name, names["variant"]]
        return getattr(self, f"_{place.stage}")(model, **names)

    def _memory(self, stage: str, *phases: Phase) -> tuple[Memory, Memory]:
        """Device and host memory of a GPU stage whose phases work on the device."""
        base = Term("Python", IMPORTS[stage] * GB)
        if not self.cuda:
            return (), tuple((base, *phase) for phase in phases)
        context = Term("CUDA", CUDA_DEVICE * GB)
        host = (base, Term("CUDA's libraries", CUDA_HOST * GB))
        return tuple((context, *phase) for phase in phases), (host,)

    def _download_model(self, model: Shapes, gguf: bool) -> Cost:
        python = Term("Python", IMPORTS["evaluate"] * GB)
        # transformers takes a GGUF file apart as a whole; everything else goes to disk as it comes.
        whole = Term("the whole model in float32", model.parameters * 4)
        return Cost((), ((python, whole) if gguf else (python,),), model.stored)

    # -- compress --

    def _bits(self, compression: Config, layer: Layer) -> float:
        """Bits a stored weight of this layer, with its share of scales and zero points.

        Of an existing checkpoint, whose bits are not known before it is here, at most.
        """
        bits = compression.get("bits")
        if bits is None or any(part in layer.name for part in compression["keep"]):
            return 16.0
        group = compression["group_size"]
        return bits + (16 + bits) / (group if group > 0 else layer.columns)

    def _packed(self, compression: Config, layers: Iterator[Layer]) -> float:
        """Bytes of compressed layers."""
        return sum(layer.parameters * self._bits(compression, layer) / 8 for layer in layers)

    def _compressed(self, model: Shapes, compression: Config) -> float:
        """Bytes of a compressed model: its layers, and the rest as it was."""
        plain = model.parameters - sum(layer.parameters for layer in model.layers)
        return self._packed(compression, model.layers) + plain * model.bytes

    def _stored(self, compression: str) -> Config:
        """The entry that says how a compression's weights are stored."""
        return integers(self.config["compressions"], compression)

    def _compress(self, model: Shapes, compression: str) -> Cost:
        entry = self.config["compressions"][compression]
        if entry["method"] == "existing":
            return self._take(model)
        if entry["method"] == "rescale":
            return self._rescale(model, compression)
        if entry["method"] != "autoround":
            return self._one_shot(model, entry)
        return self._autoround(model, compression)

    def _take(self, model: Shapes) -> Cost:
        """Comparing an existing checkpoint with the original, on the CPU; AutoAWQ's format is
        written in another first, file by file."""
        block = model.largest
        layer = max(block.layers, key=lambda layer: layer.parameters)
        python = Term("Python", IMPORTS["decompose"] * GB)
        comparing = (
            python,
            Term("a block's weights, and the same compressed", 2 * block.parameters * 2),
            Term("both in float32", 2 * block.parameters * 4),
            Term("a layer's weights while they are compared", 4 * layer.parameters * 4),
        )
        writing = (python, Term("a file of weights, twice", 2 * min(model.stored / 3, 5 * GB)))
        return Cost((), (comparing, writing), 0.0, {"disk": 2 * model.stored})

    def _rescale(self, model: Shapes, compression: str) -> Cost:
        """Scales of a compressed model, fitted layer by layer in turn with an adapter."""
        entry, stored = self.config["compressions"][compression], self._stored(compression)
        rank, rounds = entry["rank"], entry["rounds"]
        block = model.largest
        models = (
            Term("the block's weights", block.parameters * model.bytes),
            Term("the same, compressed", self._packed(stored, block.layers)),
        )
        phases: list[Phase] = []
        for layer in block.layers:
            held = Term("the layer's weights and integers", 2 * layer.rows * layer.columns * 4)
            phases.append((*models, *_dequantizing(layer)))
            phases.append((*models, held, *_refitting(layer, _groups(stored, layer))))
            phases.append((*models, held, *_fitting(layer, layer.rank(rank), True)))
        widest = max(layer.columns for layer in block.layers)
        packed = Term("a second moment, packed", widest * (widest + 1) / 2 * 4)
        device, host = self._memory("decompose", *phases)
        host = tuple((*phase, packed) for phase in host)
        work = {"single": 0.0, "double": 0.0, "memory": 0.0}
        for layer in model.layers:
            fit = _fit_work(layer, layer.rank(rank), True)
            for kind, amount in (*fit.items(), *_refit_work(layer, _groups(stored, layer)).items()):
                work[kind] = work.get(kind, 0) + rounds * amount * layer.copies
        made = self._compressed(model, stored)
        moments = sum(_moments(some) for some in model.blocks)
        return Cost(device, host, made, {**work, "disk": model.stored + 3 * made + moments})

    def _one_shot(self, model: Shapes, entry: Config) -> Cost:
        """llm-compressor's GPTQ, SparseGPT and Wanda: each layer of a block has a matrix of its
        own, and the samples run through the block twice. AWQ has none, and tries twenty scales on
        each of the block's parts."""
        calibration = self.config["calibrations"][entry["calibration"]]
        where = f"calibrations.{entry['calibration']}"
        tokens = calibration["samples"] * calibration["seqlen"]
        block = model.largest
        squares = sum(layer.columns**2 * layer.copies for layer in block.layers)
        largest = max(block.layers, key=lambda layer: layer.columns)
        awq = entry["method"] == "awq"
        working = (
            Term("the block's weights", block.parameters * model.bytes),
            Term("a layer's weights in float32, on their way", 4 * largest.parameters * 4),
        )
        if awq:
            states = tokens * (5 * model.hidden + largest.columns) * model.bytes
            working += (
                Term("the block's weights as they were", block.parameters * model.bytes),
                Term("what its parts read and give", states, f"{where}.samples"),
            )
        else:
            working += (
                Term("the layers' second moments", squares * 4),
                Term("the inverse of one, on its way", 3 * largest.columns**2 * 4),
            )
        states = Term(
            "samples' hidden states", 2 * tokens * model.hidden * model.bytes, f"{where}.samples"
        )
        whole = Term("the whole model", model.stored)
        device, host = self._memory("compress", working)
        host = tuple((*phase, states, whole) for phase in host)
        active = sum(some.active for some in model.blocks)
        products = sum(n.columns**2 * 2 * tokens for b in model.blocks for n in b.layers)
        solved = sum(n.columns**3 + n.rows * n.columns**2 for b in model.blocks for n in b.layers)
        return Cost(
            device,
            host,
            self._compressed(model, entry),
            {
                "products": (2 + 20 * awq) * 2 * tokens * active,
                "single": 0.0 if awq else products + 2 * solved,
                "disk": model.stored,
            },
        )

    def _autoround(self, model: Shapes, compression: str) -> Cost:
        """AutoRound's steps, block by block."""
        entry = self.config["compressions"][compression]
        calibration = self.config["calibrations"][entry["calibration"]]
        where = f"calibrations.{entry['calibration']}"
        block = model.largest
        tuned = sum(layer.parameters for layer in block.layers)
        cache = calibration["samples"] * calibration["seqlen"] * model.hidden * 2
        batch = min(entry["batch_size"], calibration["samples"]) * calibration["seqlen"]
        values = sum(layer.rows * layer.active for layer in block.layers)
        weights = Term("the block's weights", block.parameters * model.bytes)
        tuning = (
            weights,
            Term("rounding values and what goes with them", tuned * TUNED),
            Term("samples' hidden states in and out", 2 * cache, f"{where}.samples"),
            Term(
                "a batch's activations",
                batch * values * KEPT,
                f"compressions.{compression}.batch_size",
            ),
        )
        # Original input and output and quantized input; or original and quantized output, and
        # quantized input (auto_round/algorithms/composer.py).
        passing = (
            weights,
            Term("samples' hidden states, three times", 3 * cache, f"{where}.samples"),
        )
        device, host = self._memory("compress", tuning, passing)
        beside = entry["around"]["rank"] if "around" in entry else 0
        whole = (
            Term("the whole model", model.stored),
            Term(
                "the adapter that it is rounded around",
                sum(_factors(block, beside) for block in model.blocks) * model.bytes / 4,
            ),
        )
        host = tuple((*phase, *whole) for phase in host)
        tokens = calibration["samples"] * calibration["seqlen"]
        active = sum(block.active for block in model.blocks)
        layers = sum(layer.parameters for layer in model.layers)
        return Cost(
            device,
            host,
            self._compressed(model, entry),
            {
                # Forward, and backward to activations and to weights; two more passes a block.
                "tuning": entry["iters"] * batch * active * 6 + tokens * active * 4,
                # Each step rounds every weight and steps its rounding value.
                "memory": entry["iters"] * layers * 60,
                "disk": model.stored,
            },
        )

    # -- covariance --

    def _covariance(
        self,
        model: Shapes,
        calibration: str,
        shard: str,
        shards: str,
        compression: str | None = None,
    ) -> Cost:
        entry = self.config["calibrations"][calibration]
        tokens = entry["samples"] * entry["seqlen"]
        batch = min(self.config["runtime"]["batch_size"], entry["samples"]) * entry["seqlen"]
        mine = model.share(int(shard), int(shards))
        block = max(mine, key=lambda block: _moments(block), default=model.largest)
        stored = {} if compression is None else self._stored(compression)
        packed = "bits" in stored or stored.get("method") == "existing"
        # A CPU takes bfloat16 where that is all that is stored, without integers and their scales.
        half = model.bytes == 2 and (self.cuda or (_has_bfloat16() and not packed))
        width = 2 if half else 4
        widest = max((layer.columns for layer in block.inputs), default=0)
        sums = sum(n.columns**2 * triangle(n.columns) * n.copies for n in block.inputs) * 8
        # Of a batch: an MLP's two branches, the function of one and their product; beside them the
        # states, their norm, and what attention makes of them.
        values = 4 * widest + 8 * model.hidden
        states = Term(
            "hidden states of all samples",
            tokens * model.hidden * width,
            f"calibrations.{calibration}.samples",
        )
        weights = Term("the block's weights", block.parameters * width)
        moments = Term("sums of the second moments", sums)
        forward = (
            weights,
            moments,
            Term("a product on its way to a sum", widest**2 / min(16, math.ceil(widest / 192)) * 4),
            Term("a batch's activations", batch * values * width, "runtime.batch_size"),
        )
        if half and not self.cuda:
            copied = Term("an input in float32", batch * widest * 4, "runtime.batch_size")
            forward = (*forward, copied)
        saving = Term("one of them in float32", widest**2 * (triangle(widest) * 4 + 0.5))
        written = Term("second moments to be written, twice", 2 * _moments(block))
        phases: list[Phase] = [forward, (moments, saving)]
        libraries = "compress" if packed else "covariance"  # AutoRound's reads packed layers
        unpacked = 0.0
        if packed:
            held = self._packed(stored, block.layers)
            before = (weights, Term("the same, compressed", held))
            phases += [(*before, *_dequantizing(layer)) for layer in block.layers]
            unpacked = sum(2 * n.rows * n.columns**2 * n.copies for b in mine for n in b.layers)
        if self.cuda:
            device, host = self._memory(libraries, *phases)
            host = tuple((*phase, states, written) for phase in host)
        else:
            phases[1] = (*phases[1], written)
            device, host = self._memory(libraries, *((*phase, states) for phase in phases))
        multiplied = sum(
            n.columns**2 * triangle(n.columns) * 2 * tokens * n.active
            for some in mine
            for n in some.inputs
        )
        batches = math.ceil(tokens / batch)
        added = sum(
            n.columns**2 * triangle(n.columns) * n.copies for some in mine for n in some.inputs
        )
        attention = 2 * tokens * entry["seqlen"] * sum(_attention(some) for some in mine)
        forwarded = 2 * tokens * sum(some.active for some in mine)
        kept = sum(_moments(some) for some in mine)
        passing = 0 if int(shard) + 1 == int(shards) else states.bytes
        return Cost(
            device,
            host,
            kept,
            {
                "products": half * (forwarded + attention + self.cuda * multiplied),
                "single": (not half) * (forwarded + attention)
                + (not (half and self.cuda)) * multiplied
                + unpacked,
                "memory": added * batches * 24,  # a float32 product is written, read and added
                "disk": sum(some.parameters for some in mine) * model.bytes + kept + passing,
            },
            passing,
        )

    _compressed_covariance = _covariance

    # -- decompose --

    def _decompose(
        self, model: Shapes, compression: str, adapter: str, shard: str, shards: str
    ) -> Cost:
        entry = self.config["adapters"][adapter]
        settings = self._stored(compression)
        whole = entry["method"] == "eora"
        mine = model.share(int(shard), int(shards))
        block = max(mine, key=lambda block: _moments(block), default=model.largest)
        setting = f"adapters.{adapter}.max_rank"
        factors = _factors(block, entry["max_rank"]) + _crosses(block, entry["max_rank"])
        models = (
            Term("the block's weights", block.parameters * model.bytes),
            Term("the same, compressed", self._packed(settings, block.layers)),
        )
        phases = [
            (*models, *_fitting(layer, layer.rank(entry["max_rank"]), whole))
            for layer in block.layers
        ]
        phases += [(*models, *_dequantizing(layer)) for layer in block.layers]
        held = Term("the block's factors", factors, setting)
        widest = max(layer.columns for layer in block.layers)
        packed = Term("a second moment, packed", widest * (widest + 1) / 2 * 4)
        if self.cuda:
            device, host = self._memory("decompose", *phases)
            unpacked = Term("the same, unpacked", widest**2 * 4)
            host = tuple((*phase, held, packed, unpacked) for phase in host)
        else:
            device, host = self._memory("decompose", *((*p, held, packed) for p in phases))
        work: dict[str, float] = {}
        for some in mine:
            for layer in some.layers:
                for kind, amount in _fit_work(layer, layer.rank(entry["max_rank"]), whole).items():
                    work[kind] = work.get(kind, 0) + amount * layer.copies
            for leader in some.inputs if whole else ():
                if leader.rows > leader.columns:  # the Cholesky factor, shared
                    work["double"] = work.get("double", 0) + leader.columns**3 / 3 * leader.copies
        ranks = entry["max_rank"]
        kept = sum(_factors(some, ranks) + _crosses(some, ranks) / 2 for some in mine)
        read = sum(some.parameters * model.bytes + _moments(some) for some in mine)
        return Cost(device, host, kept, {**work, "disk": read + kept})

    # -- adapter --

    def _adapter(self, model: Shapes, adapter: str, rank: str, **_: str) -> Cost:
        sliced = sum(_factors(block, int(rank)) for block in model.blocks)
        crosses = sum(_crosses(block, int(rank)) for block in model.blocks) / 2
        made = sliced / 2 + crosses
        host = (
            Term("Python", IMPORTS["adapter"] * GB),
            Term("factors of this rank, in float32 and in 16 bits", sliced * 1.5),
        )
        return Cost((), (host,), made, {"disk": sliced + crosses + made})

    def _quantize_adapter(
        self, model: Shapes, adapter: str, rank: str, bits: str, **_: str
    ) -> Cost:
        group = self.config["adapters"][adapter]["group_size"]
        sliced = sum(_factors(block, int(rank)) for block in model.blocks) / 2
        crosses = sum(_crosses(block, int(rank)) for block in model.blocks) / 2
        packed = sliced * (int(bits) + 16 / group) / 16
        largest = max(
            layer.rank(int(rank)) * (layer.rows + layer.columns) * 4 for layer in model.layers
        )
        host = (
            Term("Python", IMPORTS["adapter"] * GB),
            Term("the adapter, in 16 bits and packed", sliced + packed),
            Term("a layer's factors while they are fitted", 6 * largest),
        )
        work = {"memory": 0.0, "single": 0.0, "disk": sliced + crosses + packed}
        for layer in model.layers:
            r = layer.rank(int(rank))
            # Each value is tried on 18 grids; each row's error is added to all rows after it.
            tried = 18 * 24 * r * (layer.rows + layer.columns)
            work["memory"] += (tried + 6 * r**2 * layer.rows) * layer.copies
            work["single"] += 2 * r**2 * (7 * layer.columns + 2 * layer.rows) * layer.copies
        return Cost((), (host,), packed, work)

    def _tune_adapter(self, model: Shapes, compression: str, adapter: str, rank: str) -> Cost:
        """Steps through the whole model, with a block's activations computed again."""
        entry = self.config["adapters"][adapter]["tune"]
        length = self.config["calibrations"][entry["calibration"]]["seqlen"]
        setting = "runtime.batch_size"
        together = min(entry["batch_size"], self.config["runtime"]["batch_size"]) * length
        factors = sum(_factors(block, int(rank)) for block in model.blocks)
        values = sum(layer.rows * layer.active for layer in model.largest.layers)
        largest = max(model.layers, key=lambda layer: layer.rows * layer.columns)
        packed = self._packed(self._stored(compression), model.layers)
        loaded = Term("the model, dequantized", model.parameters * model.bytes)
        tuning = (
            loaded,
            Term("the factors, their gradients and the optimizer's two moments", 4 * factors),
            Term("states between blocks", together * model.hidden * len(model.blocks) * 2, setting),
            Term("a block's activations", together * values * KEPT, setting),
            # In 16 bits, float32, and the gradients of both.
            Term("logits", together * model.vocabulary * 12, setting),
        )
        dequantizing = (loaded, Term("packed layers", packed), *_dequantizing(largest))
        device, host = self._memory("tune_adapter", tuning)
        if self.cuda:
            host = tuple((*phase, *dequantizing) for phase in host)
        else:
            host = (*host, (*host[0][:1], *dequantizing))
        tokens = entry["steps"] * entry["batch_size"] * length
        active = sum(block.active for block in model.blocks) + factors / 4
        head = model.hidden * model.vocabulary
        return Cost(
            device,
            host,
            factors / 2,
            # Forward twice, and backward to activations; to weights of the factors alone.
            {"products": tokens * (6 * (active + head) + 2 * factors / 4), "disk": model.stored},
        )

    # -- evaluate --

    def _adapter_bytes(self, model: Shapes, variant: Variant) -> float:
        if variant.adapter is None:
            return 0.0
        factors = sum(_factors(block, variant.rank) for block in model.blocks) / 2
        group = self.config["adapters"][variant.adapter]["group_size"]
        bits = 16 if variant.adapter_bits == 16 else variant.adapter_bits + 16 / group
        return factors * bits / 16

    def _evaluate(self, model: Shapes, variant: Variant, task: str) -> Cost:
        entry = self.config["tasks"][task]
        batch = entry.get("batch_size", self.config["runtime"]["batch_size"])
        if "perplexity" in entry:
            length = entry["window"]
            windows = entry["windows"]
            if windows == "all":
                windows = math.ceil(TEXT / length)
            batch = min(batch, windows)
            tokens, at_once = windows * length, 1  # a window after the other
        else:
            length = QUESTION_TOKENS
            tokens, at_once = entry.get("limit", QUESTIONS) * length, batch
        compression = {} if variant.compression is None else self._stored(variant.compression)
        method = compression.get("method")
        rounded = "bits" in compression or method == "existing"
        # As eora.loading does: packed on a GPU, but for what llm-compressor made. Of an existing
        # checkpoint that is not known before it is here, so that it counts as both.
        packed = rounded and self.cuda and method not in ONE_SHOT
        dense = rounded and (not packed or method == "existing")
        loaded = self._compressed(model, compression) if packed else model.stored
        setting = f"tasks.{task}.batch_size" if "batch_size" in entry else "runtime.batch_size"
        largest = max(model.layers, key=lambda layer: layer.rows * layer.columns)
        working = (
            Term("the model", loaded),
            Term("the adapter", self._adapter_bytes(model, variant)),
            Term("a batch's logits", batch * length * model.vocabulary * 2, setting),
            Term(
                "the same in float32, and log-probabilities",
                at_once * length * model.vocabulary * 8,
                setting,
            ),
            Term(
                "a batch's activations",
                batch * length * max(3 * largest.columns, 8 * model.hidden) * 2,
                setting,
            ),
        )
        phases: list[Phase] = [working]
        if packed:
            unpacked = Term("a layer, unpacked", largest.rows * largest.columns * 10)
            phases = [(*working, unpacked)]
        if dense:  # once, layer by layer
            phases.append((Term("the model", model.stored), *_dequantizing(largest)))
        device, host = self._memory("evaluate", *phases)
        if self.cuda:  # one file of weights on its way; transformers cuts them at 50 GB at most
            host = tuple((*p, Term("weights on their way", min(loaded, 5 * GB))) for p in host)
        active = sum(block.active for block in model.blocks)
        head = model.hidden * model.vocabulary
        return Cost(
            device,
            host,
            0.0,
            {"products": 2 * tokens * (active + head), "disk": loaded},
        )


@cache
def _has_bfloat16() -> bool:
    """Whether this machine's CPU has units for bfloat16; see eora.streaming.compute_dtype."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _moments(block: Block) -> float:
    """Bytes of a block's second moments on disk: packed lower triangles in float32."""
    return sum(n.columns * (n.columns + 1) / 2 * 4 * n.copies for n in block.inputs)


def _factors(block: Block, rank: int) -> float:
    """Bytes of a block's factors of this rank in float32."""
    return sum(
        layer.rank(rank) * (layer.rows + layer.columns) * 4 * layer.copies for layer in block.layers
    )


def _crosses(block: Block, rank: int) -> float:
    """Bytes of how this rank's directions go with the inputs, in float32."""
    return sum(layer.rank(rank) * layer.columns * 4 * layer.copies for layer in block.layers)


def _attention(block: Block) -> int:
    """Width of all heads: what attention writes, and its output layer reads."""
    return max(
        (n.columns for n in block.layers if "attn" in n.name or "attention" in n.name), default=0
    )


def _dequantizing(layer: Layer) -> Phase:
    """What unpacking a compressed layer takes: an identity goes through the layer's own forward."""
    rows, columns = layer.rows, layer.columns
    return (
        Term("an identity", columns**2 * 4),
        Term("the layer, unpacked", rows * columns * 15),
    )


def _fitting(layer: Layer, rank: int, whole: bool) -> Phase:
    """What the low-rank fit of one layer holds; see :mod:`eora.solver`.

    Args:
        layer: its shape.
        rank: what is fitted.
        whole: whether errors are measured by the whole second moment, not by its diagonal.
    """
    rows, columns = layer.rows, layer.columns
    small = min(rows, columns)
    error = Term("the layer's error, and scaled", rows * columns * 4 * 2)
    moment = Term("its input's second moment", columns**2 * 4)
    # The matrix and its eigenvectors, with room to work; or the matrix, a Krylov space and a proof.
    eigen = Term("the eigenproblem", small**2 * 8 * 3)
    if rows <= columns:
        products = Term("products", (rows * columns + 2 * rows**2) * 4)
        return error, moment, products, eigen
    root = Term("its Cholesky factor", columns**2 * (8 + 4) * whole)
    products = Term("products", columns**2 * 4 * 2 + rows * rank * 8 * 3)
    return error, moment, root, products, eigen


def _groups(compression: Config, layer: Layer) -> int:
    """Groups that share a scale in a row of a layer; of an existing checkpoint, as many as common
    ones have."""
    size = compression["group_size"]
    return math.ceil(layer.columns / size) if size > 0 else 1


def _refitting(layer: Layer, groups: int) -> Phase:
    """What fitting a layer's scales holds, beside its weights; see :mod:`eora.rescaling`."""
    rows, columns = layer.rows, layer.columns
    return (
        Term("its input's second moment, and a piece of it", columns**2 * 4 * 1.25),
        Term("its Cholesky factor", columns**2 * 8 * (rows > columns)),
        Term("the layer's error, and it times the moment", 3 * rows * columns * 4),
        Term("rows' systems", min(rows * groups**2 * 24, 0.8 * GB)),
        Term("integers times the moment", min(rows, 0.5 * GB / (16 * groups**2)) * columns * 8),
    )


def _refit_work(layer: Layer, groups: int) -> dict[str, float]:
    """Operations of fitting a layer's scales once, by kind."""
    rows, columns = layer.rows, layer.columns
    return {
        "single": 3 * rows * columns**2,  # the error times C; integers times half of it
        "memory": rows * columns * groups * 8,
        "double": rows * groups**3 / 3,
    }


def _fit_work(layer: Layer, rank: int, whole: bool) -> dict[str, float]:
    """Operations of one layer's fit, by kind."""
    rows, columns = layer.rows, layer.columns
    small = min(rows, columns)
    single = 2 * rows * columns**2  # an identity through the compressed layer
    double = 0.0
    if rows <= columns:
        single += rows * columns**2 * whole + 2 * rows**2 * columns
    else:
        single += rows * columns**2 + 2 * columns**3 * whole
        double += 2 * columns**2 * rank + 2 * rows * columns * rank + 4 * rows * rank**2
    # The directions of the error, and what they have in common with the inputs.
    single += 2 * rows * columns * rank + 2 * columns**2 * rank * whole
    work = {"single": single, "double": double}
    if small >= 2000 and 16 * rank <= small:  # see eora.eigen: a Krylov space, and its proof
        work["single"] += 2 * small**2 * 6 * rank
        work["double"] += small**3 / 3 + 4 * 2 * small**2 * rank
    else:  # tridiagonalisation, divide and conquer, back-transformation
        work["eigen"] = small**3 * (4 / 3 + 4 / 3 + 2)
    return work


# --- Cards. ---


@dataclass(frozen=True)
class Card:
    """A machine's rates.

    Attributes:
        title: how tables name it.
        memory: bytes; 0 where it is the machine's own.
        half, single, double: peak operations a second in bfloat16 with float32 sums, float32 and
            float64, as the maker states them (dense, tensor cores where float32 is not shortened).
        bandwidth: of its memory, bytes a second.
        efficiency: kind of work -> share of the peak that is reached.
    """

    title: str
    memory: float
    half: float
    single: float
    double: float
    bandwidth: float
    efficiency: Mapping[str, float]

    def holds(self, cost: Cost) -> bool:
        """Whether a job fits its memory, a twentieth of which is lost to fragments."""
        return not self.memory or total(peak(cost.device)) <= 0.95 * self.memory

    def hours(self, cost: Cost) -> float:
        """How long a job of this cost takes."""
        rates = {
            "products": self.half,
            "tuning": self.half,
            "single": self.single,
            "double": self.double,
            "eigen": self.double,
            "memory": self.bandwidth,
            "disk": 1 * GB,
        }
        if not cost.work:
            return 0.0
        seconds = sum(
            amount / (rates[kind] * self.efficiency.get(kind, 1.0))
            for kind, amount in cost.work.items()
        )
        return (seconds + _START) / 3600


# Seconds from a job's start to its work: imports, and on a GPU its context.
_START = 20
# Nothing below was measured on a GPU; these are cautious readings of published figures.
_ON_GPU = {
    "products": 0.5,  # large 16-bit products reach 60-75 % of peak; norms and rotations share time
    "tuning": 0.35,  # AutoRound's steps are forward and backward with rounding between products
    "single": 0.6,  # cuBLAS in float32 reaches 80-90 % on large squares; here many are narrow
    "double": 0.6,
    "eigen": 0.04,  # cuSOLVER's syevd: half of it is matrix-vector products, bound by memory
    "memory": 0.6,
    "disk": 1.0,  # a local NVMe disk at 1 GB/s; a network file system may be far slower
}
_ON_CPU = {
    "products": 0.5,
    "tuning": 0.15,
    "single": 0.8,
    "double": 0.8,
    "eigen": 0.4,  # measured: 2,000 x 2,000 by LAPACK on one core in 1.9 s
    "memory": 0.8,
    "disk": 0.5,
}
# Where float64 is weak (RTX 4090, L40S: 1/64 of float32), the eigenproblem's products reach more of
# that small peak: what bounds them is memory, as elsewhere.
_WEAK_DOUBLE = {**_ON_GPU, "eigen": 0.3}

CARDS = {
    "a100-80g": Card("A100", 80 * GB, 312e12, 19.5e12, 19.5e12, 2.04e12, _ON_GPU),
    "h100": Card("H100", 80 * GB, 989e12, 67e12, 67e12, 3.35e12, {**_ON_GPU, "eigen": 0.02}),
    "rtx-4090": Card("4090", 24 * GB, 165e12, 82.6e12, 1.29e12, 1.01e12, _WEAK_DOUBLE),
    "l40s": Card("L40S", 48 * GB, 362e12, 91.6e12, 1.43e12, 0.86e12, _WEAK_DOUBLE),
}


def cpu(cores: int) -> Card:
    """So many cores of a server with AVX-512, by the rates of one such core that we measured."""
    return Card(
        f"{cores} cores", 0, cores * 200e9, cores * 75e9, cores * 45e9, cores * 5e9, _ON_CPU
    )


# --- A config's whole plan. ---


@dataclass(frozen=True)
class Estimate:
    """A row's jobs on one card: hours, one after the other; of its longest; whether all fit."""

    card: str
    hours: float
    longest: float
    fits: bool


@dataclass(frozen=True)
class Row:
    """Jobs of a model that are alike.

    Attributes:
        label: their stage, and what sets them apart from others of it.
        jobs: how many.
        gpu, host: what the job that needs most holds at its peak, with a GPU; no gpu without one.
        cpu: the same where jobs run on the CPU; empty where no such machine is asked for.
        disk, operations: of all jobs.
        cards: one for each machine asked for.
    """

    label: str
    jobs: int
    gpu: Phase
    host: Phase
    cpu: Phase
    disk: float
    operations: float
    cards: tuple[Estimate, ...]


def _label(place: Place) -> str:
    names = dict(place.wildcards)
    if place.stage == "evaluate":
        return "evaluate original" if names["variant"] == ORIGINAL else "evaluate compressed"
    if place.stage == "compressed_covariance":
        return f"covariance {names['calibration']} of {names['compression']}"
    which = {"compress": "compression", "covariance": "calibration"}.get(place.stage, "adapter")
    return f"{place.stage} {names.get(which, '')}".strip()


def plan(config: Config, model: str, shapes: Shapes, cards: list[str], cores: int) -> list[Row]:
    """All sizeable jobs of a model, those that are alike together, in the order of the stages.

    Args:
        config: the checked config.
        model: its name there.
        shapes: the model's shapes.
        cards: names among :data:`CARDS`, or cpu.
        cores: of the CPU.
    """
    known = {name: cpu(cores) if name == "cpu" else CARDS[name] for name in cards}
    costs = {cuda: Costs(config, cuda) for cuda in (True, False)}
    alike: dict[str, list[Place]] = {}
    for place in asked(config):
        if dict(place.wildcards).get("model") == model and place.stage in SIZED:
            alike.setdefault(_label(place), []).append(place)
    rows = []
    for label, places in alike.items():
        gpu, plain = ([costs[cuda].of(place, shapes) for place in places] for cuda in (True, False))
        on_gpu = any(card.memory for card in known.values())
        estimates = []
        for card in known.values():
            some = gpu if card.memory else plain
            works = cpu(1) if places[0].stage in ONE_THREAD else card
            hours = [works.hours(cost) for cost in some]
            fits = all(card.holds(cost) for cost in some)
            estimates.append(Estimate(card.title, sum(hours), max(hours), fits))
        rows.append(
            Row(
                label,
                len(places),
                _worst(cost.device for cost in gpu) if on_gpu else (),
                _worst(cost.host for cost in gpu) if on_gpu else (),
                _worst(cost.host for cost in plain) if "cpu" in known else (),
                sum(cost.disk for cost in gpu) + max(cost.passing for cost in gpu),
                sum(cost.operations for cost in gpu),
                tuple(estimates),
            )
        )
    return rows


def _worst(memories: Iterable[Memory]) -> Phase:
    return max(map(peak, memories), key=total, default=())


LONG = 12  # hours of one job, all lost if it is killed


def warnings(row: Row) -> Iterator[str]:
    """What of a row does not fit, or takes long, and the setting that mends it."""
    small = [estimate.card for estimate in row.cards if not estimate.fits]
    if small:
        need = total(row.gpu)
        savings: dict[str, float] = {}
        for term in row.gpu:
            if term.setting:
                savings[term.setting] = savings.get(term.setting, 0) + term.bytes
        largest = sorted(savings.items(), key=lambda item: -item[1])
        mends = [f"lower {key} ({size / GB:,.1f} GB)" for key, size in largest if size > need / 20]
        least = need - sum(savings.values())
        yield (
            f"{row.label} needs {need / GB:,.0f} GB of GPU memory, too much for {', '.join(small)}:"
            f" {' or '.join([*mends, 'take a larger card'])}; {least / GB:,.0f} GB of it stay"
        )
    long = [e for e in row.cards if e.longest > LONG]
    if long and row.label.startswith(("covariance", "decompose")):
        told = ", ".join(f"{e.longest:,.0f} h on {e.card}" for e in long)
        yield f"{row.label}: a job takes {told}, lost if it is killed: raise covariance.shards"
