"""Perplexity against its definition, and the choice of what to show."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from eora import evaluation


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_the_exponential_of_the_models_own_loss(tiny_model, batch_size):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.randint(2, 256, (5, 20), generator=torch.Generator().manual_seed(0))
    found = evaluation.perplexity(model, ids, batch_size)["perplexity"]
    with torch.inference_mode():
        losses = torch.tensor([model(w[None], labels=w[None]).loss.item() for w in ids])
    assert found["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["stderr"] == pytest.approx(
        found["value"] * losses.std().item() / math.sqrt(5), rel=1e-4
    )


def test_one_window_has_no_standard_error(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = evaluation.perplexity(model, torch.arange(2, 22)[None], 8)["perplexity"]
    assert found["stderr"] is None


def test_the_usual_metric_is_shown_unless_the_config_names_one():
    metrics = {"acc": {}, "acc_norm": {}}
    assert evaluation.primary(metrics, None) == "acc_norm"
    assert evaluation.primary(metrics, "acc") == "acc"
    assert evaluation.primary({"exact_match,strict-match": {}}, None) == "exact_match,strict-match"
    with pytest.raises(KeyError, match="measured: acc, acc_norm"):
        evaluation.primary(metrics, "f1")


def test_an_unknown_task_is_refused_with_where_to_look():
    with pytest.raises(KeyError, match="no task 'arc_esay'"):
        evaluation.locate_task("arc_esay")
