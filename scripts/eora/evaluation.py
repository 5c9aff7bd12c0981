"""Judge a model: any lm-eval task, or perplexity over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eora.errors import Mistake

# Looked for in this order where the config names no metric.
PREFERRED = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "word_perplexity")

SEED = 1234

# Of the prompt by which a model's memory in use is told.
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Judgement:
    """What one task found.

    Attributes:
        metrics: name -> {value, stderr (None where it is not known), higher_is_better}.
        samples: how many were judged.
        available: how many the task has; None where it has no number of its own.
        each: metric -> what each sample adds to it, always in the same order, so that two models
            can be compared sample by sample; of metrics that are means of what samples add.
    """

    metrics: dict[str, Any]
    samples: int
    each: dict[str, list[float]]
    available: int | None = None


@torch.inference_mode()
def perplexity(model: nn.Module, input_ids: Tensor, batch_size: int) -> Judgement:
    """Perplexity over windows of text: exp of the mean negative log-likelihood a token.

    Every token but a window's first is predicted from those before it in the same window.

    Args:
        model: causal language model.
        input_ids: (windows, length) int.
        batch_size: windows a batch.

    Returns:
        The metric with its standard error over windows (delta method; None for one window). A
        window adds its mean negative log-likelihood, in nats.
    """
    device = next(model.parameters()).device
    losses = []
    for ids in tqdm(input_ids.long().split(batch_size), desc="windows", unit="batch"):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        # Window by window: float32 logits of a batch would take more than all else.
        for scores, wanted in zip(logits, ids[:, 1:], strict=True):
            nll = nn.functional.cross_entropy(scores.float(), wanted, reduction="none")
            losses.append(nll.double().mean())
    windows = torch.stack(losses).cpu()
    value = math.exp(windows.mean())
    stderr = value * float(windows.std()) / math.sqrt(len(windows)) if len(windows) > 1 else None
    metrics = {"perplexity": {"value": value, "stderr": stderr, "higher_is_better": False}}
    return Judgement(metrics, len(windows), {"perplexity": windows.tolist()})


@torch.inference_mode()
def prompt(model: PreTrainedModel) -> int:
    """Take in one prompt as generation does: its cache is kept, and the last token's logits.

    Returns:
        Its length: :data:`PROMPT_TOKENS` tokens, or as many as the model can.
    """
    limits = model.config.get_text_config()
    length = min(PROMPT_TOKENS, getattr(limits, "max_position_embeddings", None) or PROMPT_TOKENS)
    ids = torch.arange(length, device=model.device)[None] % limits.vocab_size
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    model(input_ids=ids, use_cache=True, **last)
    return length


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: dict[str, Any],
    name: str,
    *,
    num_fewshot: int | None,
    limit: int | None,
    chat_template: bool,
    batch_size: int,
) -> Judgement:
    """Run one lm-eval task or group on a model object.

    Raises:
        Mistake: the tokenizer has no chat template, or our data too few examples.
    """
    if chat_template and not tokenizer.chat_template:
        raise Mistake(
            "tasks.<name>.chat_template: this model's tokenizer has no chat template; set it to "
            "false, or judge a model that has one"
        )
    for leaf in task["tasks"].values():
        shots = leaf.config.num_fewshot if num_fewshot is None else num_fewshot
        if shots and leaf.config.custom_dataset and shots > (have := len(leaf.fewshot_docs())):
            raise Mistake(
                f"tasks.<name>.num_fewshot: {shots} examples are asked for, fewshot_dataset has "
                f"{have}; set num_fewshot to at most {have}, or name larger data"
            )
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    output = evaluator.simple_evaluate(
        wrapped,
        # A group brings its members; they must not be named again.
        tasks=[task["groups"].get(name) or task["tasks"][name]],
        # It is loaded; without this all of lm-eval's tasks would be indexed to find it.
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat_template,
        log_samples=True,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    counts = output["n-samples"]
    samples, available = (
        sum(entry[kind] for entry in counts.values()) for kind in ("effective", "original")
    )
    higher = output["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in output["results"][name].items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or "_stderr" in metric or not kind:
            continue
        stderr = output["results"][name].get(f"{metric}_stderr,{kind}")
        metrics[_shown(metric, kind)] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "higher_is_better": bool(higher.get(metric, True)),
        }
    found = _each([row for rows in output["samples"].values() for row in rows])
    each = {name: found[name] for name in metrics if name in found}
    return Judgement(metrics, samples, each, available)


def _shown(metric: str, kind: str) -> str:
    """A metric's name: that of lm-eval's filter goes with it where there is one."""
    return metric if kind == "none" else f"{metric},{kind}"


def _each(rows: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Metric -> its values in lm-eval's log of samples; of metrics that are numbers in each.

    A list (IFEval has a value an instruction) counts as that many.
    """
    found: dict[str, list[float]] = {}
    odd = set()
    for row in rows:
        for metric in row["metrics"]:
            name, value = _shown(metric, row["filter"]), row[metric]
            values = value if isinstance(value, list) else [value]
            if all(isinstance(one, int | float) for one in values):
                found.setdefault(name, []).extend(map(float, values))
            else:  # such as a likelihood with a number of words, of which a ratio is taken
                odd.add(name)
    return {name: values for name, values in found.items() if name not in odd}


def primary(metrics: dict[str, Any]) -> str:
    """The metric to show where the config names none: the best known of those measured."""
    named = [m for p in PREFERRED for m in metrics if m.partition(",")[0] == p]
    return (named or list(metrics))[0]
