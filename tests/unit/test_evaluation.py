"""Perplexity against its definition, and the choice of what to show."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from eora import evaluation, loading, tasks


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_the_exponential_of_the_models_own_loss(tiny_model, batch_size):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.randint(2, 256, (5, 20), generator=torch.Generator().manual_seed(0))
    judged = evaluation.perplexity(model, ids, batch_size)
    found = judged.metrics["perplexity"]
    with torch.inference_mode():
        losses = torch.tensor([model(w[None], labels=w[None]).loss.item() for w in ids])
    assert found["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["stderr"] == pytest.approx(
        found["value"] * losses.std().item() / math.sqrt(5), rel=1e-4
    )
    assert judged.samples == 5
    assert judged.each["perplexity"] == pytest.approx(losses.tolist(), rel=1e-5)


def test_one_window_has_no_standard_error(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    judged = evaluation.perplexity(model, torch.arange(2, 22)[None], 8)
    assert judged.metrics["perplexity"]["stderr"] is None


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cpu_runs_float16_as_float32(tiny_model, tmp_path, stored):
    model, tokenizer = loading.load(tiny_model)
    model.to(stored).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = loading.load(tmp_path)
    assert loaded.dtype == (torch.float32 if stored == torch.float16 else stored)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(loaded.dtype))


def test_the_usual_metric_is_the_primary_one():
    assert evaluation.primary({"acc": {}, "acc_norm": {}}) == "acc_norm"
    assert evaluation.primary({"f1": {}, "acc": {}}) == "acc"
    assert evaluation.primary({"f1": {}}) == "f1"
    assert evaluation.primary({"exact_match,strict-match": {}}) == "exact_match,strict-match"


@pytest.mark.parametrize("shots", [0, 2])
def test_examples_come_from_the_fewshot_data_or_not_at_all(tiny_model, tmp_path, shots):
    """Runs lm-eval itself on our own questions; gsm8k would draw five examples by itself."""
    data = {}
    for name, rows in (("test", 4), ("train", 3)):
        questions = [
            {"question": f"{name} {i}?", "answer": f"It is {i}. #### {i}"} for i in range(rows)
        ]
        Dataset.from_list(questions).save_to_disk(tmp_path / name)
        data[name] = tmp_path / name
    fewshot = data["train"] if shots else None
    task = tasks.load("gsm8k", "gsm8k", data["test"], fewshot)["tasks"]["gsm8k"]
    assert task.config.num_fewshot == (5 if shots else 0)  # the task's own number, or none
    model, tokenizer = loading.load(tiny_model)
    judged = evaluation.harness(
        model,
        tokenizer,
        {"tasks": {"gsm8k": task}, "groups": {}},
        "gsm8k",
        num_fewshot=shots,
        limit=2,
        chat_template=False,
        batch_size=2,
    )
    assert judged.samples == 2
    assert set(judged.metrics) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for name, metric in judged.metrics.items():
        assert sum(judged.each[name]) / 2 == metric["value"]
    examples = task.instances[0].args[0]
    assert examples.count("train") == shots and examples.count("test") == 1


def test_what_samples_add_is_told_of_metrics_that_are_numbers():
    row = {"filter": "none", "metrics": ["acc", "strict", "words"]}
    rows = [
        {**row, "acc": 1.0, "strict": [True, False], "words": (-3.5, 7)},
        {**row, "acc": 0, "strict": [True], "words": (-2.5, 6)},
    ]
    assert evaluation._each(rows) == {"acc": [1.0, 0.0], "strict": [1.0, 0.0, 1.0]}
    filtered = {"filter": "strict", "metrics": ["exact_match"], "exact_match": 1.0}
    assert evaluation._each([filtered]) == {"exact_match,strict": [1.0]}
