"""Fine-tuning an adapter beside the frozen compressed model: from EoRA (arXiv 2410.21271, Section
4.3) or from zero, as QLoRA (arXiv 2305.14314).

PEFT puts the factors beside the layers and transformers' Trainer steps them; what is of our own is
where it starts from, what it leaves, and that a killed job goes on from its last checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from eora import loading
from eora.adapters import Pair

_WHOLE = "whole"  # written when all of a checkpoint is
_NAME = "default"  # PEFT's, of an adapter that was given none
# Checkpoints that a run leaves on its way, and the share of its steps that the rate rises over.
CHECKPOINTS = 10
WARMUP = 0.05


class Samples(Dataset):
    """Calibration samples as the Trainer takes them: what is padding is neither seen nor learned.

    Args:
        input_ids: (samples, seqlen).
        lengths: (samples,) number of real tokens of each, from the left.
    """

    def __init__(self, input_ids: Tensor, lengths: Tensor):
        self.ids = input_ids.long()
        self.mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.ids[index], self.mask[index]
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Marks(TrainerCallback):
    """Tells whole checkpoints from those that a kill cut off."""

    def on_save(self, args, state, control, **_):
        Path(args.output_dir, f"checkpoint-{state.global_step}", _WHOLE).touch()


def last_whole(checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; those that a kill cut off are removed."""
    found = {int(path.name.rpartition("-")[2]): path for path in checkpoints.glob("checkpoint-*")}
    for step, path in list(found.items()):
        if not (path / _WHOLE).exists():
            shutil.rmtree(found.pop(step))
    return found[max(found)] if found else None


def at_once(batch_size: int, most: int) -> int:
    """Samples of a step that run together: the largest number up to ``most`` that divides it."""
    return max(n for n in range(1, min(batch_size, most) + 1) if batch_size % n == 0)


def tune(
    folder: Path,
    adapter: Path,
    samples: Samples,
    checkpoints: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    start: str,
    seed: int,
    most: int,
    device: str,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Pair], list[dict[str, Any]]]:
    """Fine-tune a 16-bit adapter by the language-model loss; the compressed layers stay.

    Those are dequantized and held in bfloat16, on a CPU in what :func:`loading.evaluation_dtype`
    says; factors and optimizer are float32. Activations are computed again on the way back.

    Args:
        folder: the compressed model.
        adapter: its adapter in PEFT's format.
        samples: what it is trained on.
        checkpoints: a folder that outlives a killed job; where it holds one, the run goes on from
            there, to the same factors.
        steps, batch_size, learning_rate, seed: AdamW steps without weight decay, samples a step.
            The rate rises over the first twentieth of the steps and falls to zero by a cosine.
        start: ``fitted``, from the adapter as it is, or ``zero``: A random, B zero.
        most: samples that run at once; more save time and take memory.
        device: cpu, or cuda with one card in sight.

    Returns:
        Layer -> (A, B) in float32 on the CPU; and of each step its number, loss (nats a token) and
        learning rate.
    """
    model, _ = loading.load(folder, trust_remote_code=trust_remote_code)
    if device != "cpu":
        model.to(torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    if start == "zero":
        torch.manual_seed(seed)
        for layer in layers.values():
            layer.reset_lora_parameters(_NAME, init_lora_weights=True)
    together = at_once(batch_size, most)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=together,
            gradient_accumulation_steps=batch_size // together,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            seed=seed,
            use_cpu=device == "cpu",
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_steps=max(1, steps // CHECKPOINTS),
            save_total_limit=2,
            report_to="none",
            dataloader_pin_memory=device != "cpu",
        ),
        train_dataset=samples,
        callbacks=[_Marks()],
    )
    trainer.train(resume_from_checkpoint=last_whole(checkpoints))
    pairs = {
        name: (
            layer.lora_A[_NAME].weight.detach().float().cpu(),
            layer.lora_B[_NAME].weight.detach().float().cpu(),
        )
        for name, layer in layers.items()
    }
    losses = [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return pairs, losses
