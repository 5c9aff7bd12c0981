"""Adapter folders and the low-rank runtime."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eora import adapters, lowrank, packing, rounding
from eora.errors import Mistake

RANK = 8


@pytest.fixture(scope="module")
def pairs(tiny_model):
    """Random adapters for every linear layer of the tiny model's blocks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return {
        name: (torch.randn(RANK, m.in_features) * 0.1, torch.randn(m.out_features, RANK) * 0.1)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "layers" in name
    }


@pytest.mark.parametrize("narrow", ["none", "a kind", "one"])
def test_peft_loads_it_and_gives_the_same_logits(tiny_model, pairs, tmp_path, narrow):
    """Also where layers that are narrower than the rank have one of their own."""
    few = {"none": "x", "a kind": "k_proj", "one": "layers.1.self_attn.k_proj"}[narrow]
    pairs = {n: (a[:3], b[:, :3]) if n.endswith(few) else (a, b) for n, (a, b) in pairs.items()}
    adapters.save_peft(tmp_path, pairs, "tiny")
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    key = {"none": [], "a kind": ["k_proj"], "one": [f"model.{few}"]}[narrow]
    assert list(told.get("rank_pattern", {})) == key and told["r"] == RANK
    ids = torch.arange(2, 34)[None]
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path
        )(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model)
        before = plain(ids).logits
        ours = lowrank.attach(plain, tmp_path)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 0.1  # the adapter does something


def test_config_is_the_same_from_run_to_run(pairs, tmp_path):
    for name in ("a", "b"):
        adapters.save_peft(tmp_path / name, dict(sorted(pairs.items())), "tiny")
    first, second = ((tmp_path / n / "adapter_config.json").read_bytes() for n in "ab")
    assert first == second
    assert json.loads(first)["lora_alpha"] == RANK


def rounded(pairs, bits):
    """Each layer's name, A and B^T on their grids."""
    for layer, (a, b) in pairs.items():
        yield layer, *(rounding.nearest(m, bits, 32) for m in (a, b.T.contiguous()))


def test_four_bits_take_about_four_and_a_half(pairs, tmp_path):
    adapters.save_peft(tmp_path / "r16", pairs, "tiny")
    packing.save(tmp_path / "r4", rounded(pairs, 4), 4, 32, "tiny")

    def payload(path):
        return sum(
            t.nbytes for name, t in load_file(path).items() if not name.endswith("weight_shape")
        )

    ratio = payload(tmp_path / "r4" / packing.WEIGHTS) / payload(
        tmp_path / "r16" / adapters.WEIGHTS
    )
    assert ratio == pytest.approx(4.5 / 16, rel=0.01)


def test_packed_factors_stay_packed_and_compute_their_rounded_product(tiny_model, pairs, tmp_path):
    packing.save(tmp_path, rounded(pairs, 4), 4, 32, "tiny")
    model = lowrank.attach(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    layer, (a, b) = next(iter(pairs.items()))
    wrapped = model.get_submodule(layer)
    dtypes = {t.dtype for n, t in wrapped.factors.named_buffers() if n.endswith("packed")}
    assert dtypes == {torch.int32}
    x = torch.randn(5, a.shape[1])
    ((_, low_a, low_b_t),) = rounded({layer: (a, b)}, 4)
    with torch.inference_mode():
        expected = wrapped.base(x) + x @ low_a.values.T @ low_b_t.values
        torch.testing.assert_close(wrapped(x), expected)


def test_an_adapter_of_another_model_is_refused(tiny_model, pairs, tmp_path):
    adapters.save_peft(tmp_path, {"model.layers.9.mlp.up_proj": (torch.ones(8, 64),) * 2}, "x")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(Mistake, match=r"another model.*layers\.9"):
        lowrank.attach(model, tmp_path)
